"""Log-probs of chosen tokens from logits that tensor parallelism cut along the vocabulary.

Shapes: N tokens, Vp columns of the vocabulary on this rank (padding included), R ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from poweropd_megatron.ops.backends import IGNORED_TARGET, Softmaxes, kernels_for
from poweropd_megatron.ops.rows import check_logits, check_rows_apart, check_shards


class TokenLogprobs(NamedTuple):
    """Natural log-probs of the target tokens, and the entropy of their distributions."""

    logp_N: Tensor
    """fp32, differentiable."""
    entropy_N: Tensor
    """fp32, in nats, detached."""


def vocab_parallel_logprob(
    logits_NVp: Tensor,
    targets_N: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    inplace_backward: bool = False,
) -> TokenLogprobs:
    """Return log p(target) and the entropy for each row of logits.

    Shapes: logits_NVp [N, Vp] fp32 or bf16, rank r holding columns r*Vp ... (r+1)*Vp - 1 of the
    vocabulary; targets_N [N] int64 in [0, vocab_size), the same on all ranks, or -100 for rows that
    are ignored: log-prob, entropy and gradient 0. Columns at and beyond vocab_size are padding:
    they take no part in the softmax and get zero gradient.
    Numerics: fp32 exponentials about the row's maximum; the gradient has the logits' dtype.
    Memory: 24 bytes a token beside the logits, and 16 more a rank of the group; the gradient is a
    copy of the logits unless inplace_backward, which writes it over them.
    Cost: one read of the logits and one all_gather of 16 bytes a token forward; one read and one
    write backward, without a collective.
    Raises: ValueError naming the tensor that doesn't fit, or a target outside the vocabulary.
    """
    num_columns = logits_NVp.shape[-1:].numel()
    first_column = dist.get_rank(tp_group) * num_columns
    check_logits(logits_NVp, targets_N, first_column=first_column, vocab_size=vocab_size)
    if inplace_backward:
        check_rows_apart(logits_NVp)
    check_shards(num_columns, num_ranks=dist.get_world_size(tp_group), vocab_size=vocab_size)
    logp_N, entropy_N = _VocabParallelLogprob.apply(
        logits_NVp, targets_N.contiguous(), first_column, vocab_size, tp_group, inplace_backward
    )
    return TokenLogprobs(logp_N, entropy_N)


def combine_over_ranks(
    stats_N4: Tensor, targets_N: Tensor, tp_group: dist.ProcessGroup, *, with_entropy: bool
) -> Softmaxes:
    """Return the softmaxes of rows whose states each rank has for its columns.

    The states are merged in the order of the ranks, so that all ranks get the same bits.
    Cost: one all_gather of 16 bytes a token.
    """
    size = dist.get_world_size(tp_group)
    stats_RN4 = stats_N4[None]
    if size > 1:
        stats_RN4 = stats_N4.new_empty(size, *stats_N4.shape)
        dist.all_gather_single(stats_RN4.flatten(0, 1), stats_N4, group=tp_group)
    return kernels_for(stats_N4).combine(stats_RN4, targets_N, with_entropy=with_entropy)


class _VocabParallelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NVp: Tensor,
        targets_N: Tensor,
        first_column: int,
        vocab_size: int,
        tp_group: dist.ProcessGroup,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        stats_N4 = kernels_for(logits_NVp).row_stats(
            logits_NVp, targets_N, first_column=first_column, vocab_size=vocab_size
        )
        softmax = combine_over_ranks(stats_N4, targets_N, tp_group, with_entropy=True)
        ctx.save_for_backward(logits_NVp, targets_N, softmax.maximum_N, softmax.inverse_sum_N)
        ctx.columns = {"first_column": first_column, "vocab_size": vocab_size}
        ctx.inplace_backward = inplace_backward
        assert softmax.entropy_N is not None
        ctx.mark_non_differentiable(softmax.entropy_N)
        return softmax.logp_N, softmax.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_NVp, targets_N, maximum_N, inverse_sum_N = ctx.saved_tensors
        grad_logits = logits_NVp if ctx.inplace_backward else logits_NVp.clone()
        kernels_for(logits_NVp).row_grad_(
            grad_logits,
            targets_N,
            maximum_N=maximum_N,
            inverse_sum_N=inverse_sum_N,
            grad_N=torch.where(targets_N == IGNORED_TARGET, 0.0, grad_N).contiguous(),
            **ctx.columns,
        )
        if ctx.inplace_backward:
            # A second backward would read gradients for logits: autograd refuses it by this.
            torch.autograd.graph.increment_version(logits_NVp)
        return grad_logits, None, None, None, None, None
