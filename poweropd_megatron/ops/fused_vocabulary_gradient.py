"""Two LM heads, an objective over the whole vocabulary and its gradients, in one visit of a token.

Shapes: N tokens, n of a chunk, H hidden of the student and G of the teacher, Vp columns of the
vocabulary on this rank (padding included), R ranks, K sums.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from poweropd_megatron.ops.arguments import check_fp32
from poweropd_megatron.ops.backends import IGNORED_TARGET, Softmaxes, kernels_for
from poweropd_megatron.ops.compiled_rows import num_valid_columns
from poweropd_megatron.ops.gradient_in_forward import gradient_in_forward
from poweropd_megatron.ops.lm_head_tiles import Gradients, LMHead, logit_chunks, token_chunks
from poweropd_megatron.ops.vocabulary_objectives import (
    Distributions,
    VocabularyObjective,
    kl_divergence,
)

BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Logits of each model that are worked on at a time: a CPU's stay in its cache, a GPU wants large
blocks."""


class VocabularyGradient(NamedTuple):
    """The loss of some tokens and what is known of them; all but the loss are [N] fp32, detached.

    The rows that are ignored have zeros.
    """

    loss: Tensor
    """The sum of weight * loss_N, a differentiable scalar."""
    loss_N: Tensor
    reverse_kl_N: Tensor
    """KL(student || teacher) over the whole vocabulary, in nats, whatever the objective is."""
    logp_N: Tensor
    """The student's log-prob of the target."""
    teacher_logp_N: Tensor
    entropy_N: Tensor
    """The student's, in nats."""


def fused_vocabulary_gradient(
    hidden_NH: Tensor,
    head: LMHead,
    teacher_hidden_NG: Tensor,
    teacher_head: LMHead,
    targets_N: Tensor,
    objective: VocabularyObjective,
    weight_N: Tensor | None = None,
) -> VocabularyGradient:
    """Return an objective of both distributions at each token; its gradients are made on the way.

    For each chunk of tokens both models' logits are multiplied out side by side, each rank those of
    its own columns; then the student's are overwritten by their gradient. main_grad, the hidden
    states' gradient, and what may follow: as for gradient_in_forward. The targets only say which
    tokens' log-probs are returned.
    Shapes: hidden_NH [N, H], teacher_hidden_NG [N, G], targets_N [N] int64 in [0, vocab_size) or
    -100 (no part of the loss, but multiplied with the student's weight like the others: no NaN);
    weight_N [N] fp32, by default 1 each.
    Memory: CHUNK_BYTES of logits, of both models together; some blocks of BLOCK_ELEMENTS; an fp32
    copy of hidden_NH's gradient.
    Cost: four GEMMs. Over several ranks two all_gathers in each chunk, of 32 and of 4 (1 + K) bytes
    a token, K at most 3; with top_k a third of 4 k bytes. All ranks get the same bits.
    Raises: ValueError naming the tensor that doesn't fit, or a top_k below 1.
    """
    head.check(hidden_NH, targets_N)
    teacher_head.check(teacher_hidden_NG, targets_N)
    _check_heads_alike(head, teacher_head)
    if objective.top_k is not None and objective.top_k < 1:
        raise ValueError(f"the objective's top_k must be at least 1, got {objective.top_k}")
    if weight_N is None:
        weight_N = hidden_NH.new_ones(len(hidden_NH), dtype=torch.float32)
    check_fp32("weight_N", weight_N, targets_N.shape, targets_N.device)
    weight_N = torch.where(targets_N == IGNORED_TARGET, 0.0, weight_N)
    targets_N = targets_N.contiguous()
    results_5N = hidden_NH.new_zeros(5, len(hidden_NH), dtype=torch.float32)

    def visit(grads: Gradients | None) -> Tensor:
        chunks = token_chunks(hidden_NH, head, teacher_head)
        of_student = logit_chunks(hidden_NH, head, chunks, grads)
        of_teacher = logit_chunks(teacher_hidden_NG, teacher_head, chunks, None)
        for (rows, logits), (_, teacher_logits) in zip(of_student, of_teacher, strict=True):
            pair = _Pair(head, targets_N[rows], logits, teacher_logits, objective)
            results_5N[:, rows] = pair.results()
            if grads is not None:
                pair.overwrite_by_gradient(weight_N[rows])
        return (weight_N * results_5N[0]).sum()

    loss = gradient_in_forward(hidden_NH, head.weight_VpH, visit)
    return VocabularyGradient(loss, *results_5N)


def _check_heads_alike(head: LMHead, teacher_head: LMHead) -> None:
    for name in ("vocab_size", "logits_dtype"):
        ours, theirs = getattr(head, name), getattr(teacher_head, name)
        if ours != theirs:
            raise ValueError(f"{name} is {ours} of the student's head, {theirs} of the teacher's")
    if len(head.weight_VpH) != len(teacher_head.weight_VpH):
        raise ValueError(
            f"weight_VpH has {len(head.weight_VpH)} columns of the student's head, "
            f"{len(teacher_head.weight_VpH)} of the teacher's: they must be cut alike"
        )


class _Pair:
    """Both models' logits of a chunk of tokens, [n, Vp], and what all ranks know of them."""

    def __init__(
        self,
        head: LMHead,
        targets_n: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        objective: VocabularyObjective,
    ) -> None:
        self.student_logits, self._teacher_logits = student_logits, teacher_logits
        self._head, self._objective, self._targets_n = head, objective, targets_n
        self._columns = num_valid_columns(student_logits, head.first_column, head.vocab_size)
        is_ignored_n = targets_n == IGNORED_TARGET
        # NaN in them must not reach the others' sums through 0 * NaN.
        student_logits[is_ignored_n], teacher_logits[is_ignored_n] = 0, 0
        self._student, self._teacher = self._softmaxes()
        self._threshold_n1 = None if objective.top_k is None else self._top_threshold()
        parts = [
            torch.stack(
                [kl_divergence(pair.student_logp_nv, pair.teacher_logp_nv), *objective.sums(pair)],
                dim=1,
            )
            for _, pair in self._blocks()
        ]
        sums_nK = _sum_over_ranks(torch.cat(parts), objective.num_logs, head.tp_group)
        self._sums_nK = torch.where(is_ignored_n[:, None], 0.0, sums_nK)

    def results(self) -> Tensor:
        """Return loss, reverse KL, log-probs of student and teacher, entropy: [5, n]."""
        assert self._student.entropy_N is not None
        return torch.stack(
            [
                self._objective.loss(self._sums_nK),
                self._sums_nK[:, 0],
                self._student.logp_N,
                self._teacher.logp_N,
                self._student.entropy_N,
            ]
        )

    def overwrite_by_gradient(self, weight_n: Tensor) -> None:
        """Write the gradient of the weighted losses over the student's logits."""
        self.student_logits[:, self._columns :] = 0
        for rows, pair in self._blocks():
            gradient = self._objective.gradient(pair, self._sums_nK[rows])
            self.student_logits[rows, : self._columns] = gradient.mul_(weight_n[rows, None])

    def _softmaxes(self) -> tuple[Softmaxes, Softmaxes]:
        """Return both models' softmaxes, with one collective."""
        head, kernels = self._head, kernels_for(self.student_logits)
        stats = [
            kernels.row_stats(
                logits,
                self._targets_n,
                first_column=head.first_column,
                vocab_size=head.vocab_size,
            )
            for logits in (self.student_logits, self._teacher_logits)
        ]
        both = head.combine(torch.cat(stats), self._targets_n.repeat(2), with_entropy=True)
        size = len(self._targets_n)
        return _rows_of(both, slice(size)), _rows_of(both, slice(size, None))

    def _top_threshold(self) -> Tensor:
        """Return the k-th largest logit of each row over all ranks, [n, 1]; -inf if there are less.

        Tokens tied with it are among the top ones, so that these don't depend on the layout.
        """
        top_k = self._objective.top_k
        assert top_k is not None
        of_student = self._objective.top_of == "student"
        logits = self.student_logits if of_student else self._teacher_logits
        own = logits[:, : self._columns]
        own = own.topk(min(top_k, self._columns), sorted=False).values.float()
        own = torch.nn.functional.pad(own, (0, top_k - own.shape[1]), value=-torch.inf)
        candidates = _gathered(own, self._head.tp_group).movedim(0, 1).flatten(1)
        return candidates.topk(top_k).values[:, -1:]

    def _blocks(self) -> Iterator[tuple[slice, Distributions]]:
        """Yield (rows, log-probs) of a few rows at a time."""
        elements = BLOCK_ELEMENTS[self.student_logits.device.type]
        height = max(1, elements // max(1, self._columns))
        for first in range(0, max(1, len(self._targets_n)), height):
            rows = slice(first, first + height)
            yield (
                rows,
                Distributions(
                    _logp(self.student_logits[rows, : self._columns], self._student, rows),
                    _logp(self._teacher_logits[rows, : self._columns], self._teacher, rows),
                    self._is_top(rows),
                ),
            )

    def _is_top(self, rows: slice) -> Tensor | None:
        if self._threshold_n1 is None:
            return None
        of_student = self._objective.top_of == "student"
        logits = self.student_logits if of_student else self._teacher_logits
        return logits[rows, : self._columns] >= self._threshold_n1[rows]


def _rows_of(softmax: Softmaxes, rows: slice) -> Softmaxes:
    assert softmax.entropy_N is not None
    return Softmaxes(
        logp_N=softmax.logp_N[rows],
        entropy_N=softmax.entropy_N[rows],
        maximum_N=softmax.maximum_N[rows],
        inverse_sum_N=softmax.inverse_sum_N[rows],
    )


def _logp(logits_nv: Tensor, softmax: Softmaxes, rows: slice) -> Tensor:
    """Return the log-probs of some rows, as the kernels have them: the maximum goes first."""
    logp_nv = logits_nv - softmax.maximum_N[rows, None]
    logp_nv.add_(softmax.inverse_sum_N[rows, None].log())
    return logp_nv.clamp_(min=torch.finfo(torch.float32).min)


def _sum_over_ranks(own_nK: Tensor, num_logs: int, tp_group: dist.ProcessGroup) -> Tensor:
    """Return the sum of all ranks' values, added in the order of the ranks.

    The last num_logs are logarithms, before and after; that of an empty sum is the most negative
    number, as for Distributions.
    """
    gathered_RnK = _gathered(own_nK, tp_group)
    num_sums = own_nK.shape[1] - num_logs
    logs_n = gathered_RnK[..., num_sums:].logsumexp(0).clamp_(min=torch.finfo(torch.float32).min)
    return torch.cat([gathered_RnK[..., :num_sums].sum(0), logs_n], dim=1)


def _gathered(own: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Return all ranks' values, [R, ...]."""
    size = dist.get_world_size(tp_group)
    if size == 1:
        return own[None]
    gathered = own.new_empty(size, *own.shape)
    dist.all_gather_single(gathered.flatten(0, 1), own.contiguous(), group=tp_group)
    return gathered
