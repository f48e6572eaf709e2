"""Log-probs of chosen tokens from logits that tensor parallelism cut along the vocabulary.

Shapes: N tokens, Vp columns of the vocabulary on this rank (padding included), R ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from poweropd_megatron.ops.arguments import check_dense
from poweropd_megatron.ops.backends import IGNORED_TARGET, Softmaxes, kernels_for
from poweropd_megatron.ops.rows import check_logits, check_rows_apart, check_shards
from poweropd_megatron.ops.shard_agreement import check_shards_agree, describe_shard


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
    vocabulary, as many on each; targets_N [N] int64 in [0, vocab_size), the same on all ranks, or
    -100 for rows that are ignored: log-prob, entropy and gradient 0. Columns at and beyond
    vocab_size are padding: they take no part in the softmax and get zero gradient.
    Numerics: fp32 exponentials about the row's maximum; the gradient has the logits' dtype.
    Memory beside the logits: 32 bytes a token, and over R >= 2 ranks 56 + 16 R of them while the
    ranks' states are combined; the gradient is a copy of the logits unless inplace_backward, which
    writes it over them.
    Cost: one read of the logits and one all_gather of 16 bytes a token forward; one read and one
    write backward, without a collective.
    Raises: ValueError naming the tensor that doesn't fit, or a target outside the vocabulary; on
    all ranks if they have another number of columns, another vocab_size or other targets.
    """
    check_dense("logits_NVp", logits_NVp)
    num_columns = logits_NVp.shape[-1:].numel()
    first_column = dist.get_rank(tp_group) * num_columns
    check_logits(logits_NVp, targets_N, first_column=first_column, vocab_size=vocab_size)
    if inplace_backward:
        check_rows_apart(logits_NVp)
    logp_N, entropy_N = _VocabParallelLogprob.apply(
        logits_NVp, targets_N.contiguous(), first_column, vocab_size, tp_group, inplace_backward
    )
    return TokenLogprobs(logp_N, entropy_N)


def combine_over_ranks(
    stats_N4: Tensor,
    targets_N: Tensor,
    tp_group: dist.ProcessGroup,
    *,
    num_columns: int,
    vocab_size: int,
    with_entropy: bool,
) -> Softmaxes:
    """Return the softmaxes of rows whose states each rank has for its columns.

    The states are merged in the order of the ranks, so that all ranks get the same bits. Whether
    the ranks' columns are even shares of the vocabulary is seen here, where all of them see it.
    Cost: one all_gather of 16 bytes a token, and 16 more.
    Raises: ValueError on all ranks if they have another number of columns, another vocab_size or
    other targets, or if vocab_size is more than all columns.
    """
    size, kernels = dist.get_world_size(tp_group), kernels_for(stats_N4)
    if size == 1:
        check_shards(num_columns, num_ranks=1, vocab_size=vocab_size)
        return kernels.combine(stats_N4[None], targets_N, with_entropy=with_entropy)
    # Ahead of the states is what they are of; with an ignored target it makes no softmax.
    described = describe_shard(targets_N, num_columns=num_columns, vocab_size=vocab_size)
    sent = torch.cat([described, stats_N4])
    gathered_R = sent.new_empty(size, *sent.shape)
    dist.all_gather_single(gathered_R.flatten(0, 1), sent, group=tp_group)
    check_shards_agree(gathered_R[:, 0], tp_group, num_columns=num_columns, vocab_size=vocab_size)
    check_shards(num_columns, num_ranks=size, vocab_size=vocab_size)
    targets = torch.cat([targets_N.new_tensor([IGNORED_TARGET]), targets_N])
    softmax = kernels.combine(gathered_R, targets, with_entropy=with_entropy)
    return Softmaxes(
        logp_N=softmax.logp_N[1:],
        entropy_N=None if softmax.entropy_N is None else softmax.entropy_N[1:],
        maximum_N=softmax.maximum_N[1:],
        inverse_sum_N=softmax.inverse_sum_N[1:],
    )


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
        softmax = combine_over_ranks(
            stats_N4,
            targets_N,
            tp_group,
            num_columns=logits_NVp.shape[1],
            vocab_size=vocab_size,
            with_entropy=True,
        )
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
        # A second backward in place would read gradients for logits: autograd refuses it, since
        # their version has changed.
        return grad_logits, None, None, None, None, None
