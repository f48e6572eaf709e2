"""Log-probs of chosen tokens from logits that tensor parallelism cut along the vocabulary.

Shapes: N tokens, Vp columns of the vocabulary on this rank (padding included).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class TokenLogprobs(NamedTuple):
    """Natural log-probs of the target tokens, and the entropy of their distributions."""

    logp_N: Tensor
    """fp32, differentiable."""
    entropy_N: Tensor
    """fp32, in nats, detached."""


def vocab_parallel_logprob(
    logits_NVp: Tensor, targets_N: Tensor, *, vocab_size: int, tp_group: dist.ProcessGroup
) -> TokenLogprobs:
    """Return log p(target) and the entropy for each row of logits.

    Shapes: logits_NVp [N, Vp] in any float dtype, rank r holding columns r*Vp ... (r+1)*Vp - 1 of
    the vocabulary; targets_N [N] int64 in [0, vocab_size), the same on all ranks. Columns at and
    beyond vocab_size are padding: they take no part in the softmax and get zero gradient.
    Numerics: log-sum-exp in fp32 about the row's maximum; the gradient has the logits' dtype.
    Cost: two all_reduces forward (4 and 12 bytes a token), none backward.
    Raises: ValueError for shapes that don't match, or targets outside the vocabulary.
    """
    if logits_NVp.dim() != 2 or targets_N.shape != logits_NVp.shape[:1]:
        raise ValueError(
            f"expected logits [N, Vp] and targets [N], got {tuple(logits_NVp.shape)} "
            f"and {tuple(targets_N.shape)}"
        )
    if targets_N.numel() and not (0 <= int(targets_N.min()) <= int(targets_N.max()) < vocab_size):
        raise ValueError(
            f"targets must lie in [0, {vocab_size}), got {int(targets_N.min())} "
            f"to {int(targets_N.max())}"
        )
    logp_N, entropy_N = _VocabParallelLogprob.apply(logits_NVp, targets_N, vocab_size, tp_group)
    return TokenLogprobs(logp_N, entropy_N)


class _VocabParallelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NVp: Tensor,
        targets_N: Tensor,
        vocab_size: int,
        tp_group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        first_column = dist.get_rank(tp_group) * logits_NVp.shape[1]
        columns = min(max(vocab_size - first_column, 0), logits_NVp.shape[1])
        scores = logits_NVp[:, :columns].float()

        maximum_N = (
            scores.amax(dim=1) if columns else scores.new_full((scores.shape[0],), -torch.inf)
        )
        dist.all_reduce(maximum_N, op=dist.ReduceOp.MAX, group=tp_group)

        shifted = scores - maximum_N[:, None]
        weights = shifted.exp()
        local_N, is_here_N = _local_targets(targets_N, first_column, columns)
        sums_3N = torch.zeros(3, scores.shape[0], device=scores.device)
        sums_3N[0] = weights.sum(dim=1)
        sums_3N[1] = torch.where(weights > 0, weights * shifted, 0.0).sum(dim=1)
        if columns:
            target_N = shifted.gather(1, local_N[:, None])[:, 0]
            sums_3N[2] = torch.where(is_here_N, target_N, 0.0)
        dist.all_reduce(sums_3N, group=tp_group)

        log_normaliser_N = sums_3N[0].log()
        logp_N = sums_3N[2] - log_normaliser_N
        entropy_N = log_normaliser_N - sums_3N[1] / sums_3N[0]
        ctx.save_for_backward(logits_NVp, local_N, is_here_N, maximum_N, sums_3N[0])
        ctx.columns = columns
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_NVp, local_N, is_here_N, maximum_N, normaliser_N = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits_NVp)
        if ctx.columns:
            shifted = logits_NVp[:, : ctx.columns].float() - maximum_N[:, None]
            grad = shifted.exp_().mul_(-(grad_N / normaliser_N)[:, None])
            one_hot_N = torch.where(is_here_N, grad_N, 0.0)
            grad.scatter_add_(1, local_N[:, None], one_hot_N[:, None])
            grad_logits[:, : ctx.columns] = grad
        return grad_logits, None, None, None


def _local_targets(targets_N: Tensor, first_column: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return each target's column on this rank (0 where it is elsewhere) and whether it is here."""
    local_N = targets_N - first_column
    is_here_N = (local_N >= 0) & (local_N < columns)
    return torch.where(is_here_N, local_N, 0), is_here_N
