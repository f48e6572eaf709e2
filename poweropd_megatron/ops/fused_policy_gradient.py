"""LM head, log-prob, reward and gradients in one visit of each token.

Shapes: N tokens, n of a chunk, H hidden, Vp columns of the vocabulary on this rank (padding
included).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from poweropd_megatron.objectives.loss import policy_gradient_loss
from poweropd_megatron.ops.arguments import check_fp32
from poweropd_megatron.ops.backends import IGNORED_TARGET, kernels_for
from poweropd_megatron.ops.lm_head_tiles import (
    Gradients,
    LMHead,
    column_tiles,
    even_slices,
    is_widened,
)
from poweropd_megatron.ops.matmul import product

CHUNK_BYTES = {"cpu": 160 << 20, "cuda": 2 << 30}
"""Logits of the tokens that are visited at a time: whole rows of a rank's columns, padding not
counted. The weight's
gradient is read and written once a chunk, which a GPU's memory feels sooner."""


class PolicyGradient(NamedTuple):
    """The loss of some tokens and what it is made of."""

    loss: Tensor
    """- sum of reward * log p_S, a differentiable scalar."""
    logp_N: Tensor
    """fp32, detached."""
    entropy_N: Tensor
    """fp32, in nats, detached."""


Reward = Callable[[Tensor, Tensor], Tensor]
"""(teacher_logp_n, student_logp_n) -> reward_n, for any part of the tokens."""
Weight = Callable[[slice, Tensor], Tensor]
"""(rows, student_logp_n) -> weight_n, for these rows of the tokens."""


def fused_policy_gradient(
    hidden_NH: Tensor,
    head: LMHead,
    targets_N: Tensor,
    teacher_logp_N: Tensor,
    reward: Reward,
    weight: Weight | None = None,
) -> PolicyGradient:
    """Return - sum of weight * reward * log p_S over the tokens; the gradients are made on the way.

    Reward and weight (1 unless given) have to be of each token by itself, and are held constant.
    Each chunk of tokens is visited once: its logits, their softmax, the rewards, the gradient over
    the logits, the shares of the gradients. With a `main_grad` on the weight these are added to it
    here, so the loss must be differentiated exactly once, with an upstream gradient of 1. That is
    asserted in backward, when main_grad has been written; a reward that raises in a later chunk
    leaves main_grad with the chunks before it. Either way, zero main_grad before going on.
    The gradient of hidden_NH is this rank's share, as for any column-parallel layer. Rows that are
    ignored are multiplied like the others, so NaN in their hidden states would reach the weight's
    gradient: leave them out.
    Shapes: hidden_NH [N, H], targets_N [N] int64 in [0, vocab_size) or -100 (no part of the loss),
    teacher_logp_N [N] fp32.
    Memory: CHUNK_BYTES of logits, and an fp32 copy of hidden_NH's gradient.
    Cost: three GEMMs; one all_gather of 16 bytes a token in each chunk.
    Raises: ValueError naming the tensor that doesn't fit.
    """
    head.check(hidden_NH, targets_N)
    check_fp32("teacher_logp_N", teacher_logp_N, targets_N.shape, targets_N.device)
    with_gradient = torch.is_grad_enabled() and (
        hidden_NH.requires_grad or head.weight_VpH.requires_grad
    )
    loss, logp_N, entropy_N = _GradientInForward.apply(
        hidden_NH,
        head.weight_VpH,
        targets_N.contiguous(),
        teacher_logp_N.contiguous(),
        head,
        reward,
        weight,
        with_gradient,
    )
    return PolicyGradient(loss, logp_N, entropy_N)


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VpH: Tensor,
        targets_N: Tensor,
        teacher_logp_N: Tensor,
        head: LMHead,
        reward: Reward,
        weight: Weight | None,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = kernels_for(hidden_NH)
        grads = Gradients(hidden_NH, weight_VpH) if with_gradient else None
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        logp_N, entropy_N = loss.repeat(len(hidden_NH)), loss.repeat(len(hidden_NH))
        for rows, logits in _logit_chunks(hidden_NH, head):
            targets = targets_N[rows]
            stats = kernels.row_stats(
                logits, targets, first_column=head.first_column, vocab_size=head.vocab_size
            )
            softmax = head.combine(stats, targets, with_entropy=True)
            reward_n = reward(teacher_logp_N[rows], softmax.logp_N)
            check_fp32("what reward returns", reward_n, targets.shape, targets.device)
            if weight is not None:
                reward_n = weight(rows, softmax.logp_N) * reward_n
            reward_n = torch.where(targets == IGNORED_TARGET, 0.0, reward_n)
            loss += policy_gradient_loss(softmax.logp_N, reward_n)
            assert softmax.entropy_N is not None
            logp_N[rows], entropy_N[rows] = softmax.logp_N, softmax.entropy_N
            if grads is None:
                continue
            kernels.row_grad_(
                logits,
                targets,
                maximum_N=softmax.maximum_N,
                inverse_sum_N=softmax.inverse_sum_N,
                grad_N=-reward_n,
                first_column=head.first_column,
                vocab_size=head.vocab_size,
            )
            for tile in _product_tiles(weight_VpH, rows):
                grads.add(rows, tile, logits[:, tile])
        ctx.mark_non_differentiable(logp_N, entropy_N)
        if grads is not None:
            ctx.weight_is_done = grads.adds_to_main_grad
            ctx.is_differentiated = False
            ctx.save_for_backward(grads.hidden(), grads.weight())
        return loss, logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_NH, grad_weight_VpH = ctx.saved_tensors
        if ctx.weight_is_done:
            if ctx.is_differentiated:
                raise RuntimeError(
                    "the weight's gradient went to main_grad once: the loss can't be "
                    "differentiated a second time"
                )
            ctx.is_differentiated = True
            torch._assert_async(
                grad_loss == 1, "the weight's gradient is in main_grad: the loss can't be scaled"
            )
        elif grad_weight_VpH is not None:
            grad_weight_VpH = (grad_weight_VpH * grad_loss).to(grad_weight_VpH.dtype)
        grad_hidden_NH = (grad_hidden_NH * grad_loss).to(grad_hidden_NH.dtype)
        return grad_hidden_NH, grad_weight_VpH, None, None, None, None, None, None


def _logit_chunks(hidden_NH: Tensor, head: LMHead) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, logits) over chunks of tokens; each overwrites the one before."""
    weight_VpH = head.weight_VpH
    # By what is the same on all ranks, which have to have the same chunks.
    num_ranks = dist.get_world_size(head.tp_group)
    row_bytes = -(-head.vocab_size // num_ranks) * head.logits_dtype.itemsize
    chunks = even_slices(len(hidden_NH), CHUNK_BYTES[hidden_NH.device.type] // row_bytes)
    buffer = hidden_NH.new_empty(
        chunks[0].stop if chunks else 0, len(weight_VpH), dtype=head.logits_dtype
    )
    for rows in chunks:
        logits = buffer[: rows.stop - rows.start]
        for columns in _product_tiles(weight_VpH, rows):
            product(hidden_NH[rows], weight_VpH[columns].t(), out=logits[:, columns])
        yield rows, logits


def _product_tiles(weight_VpH: Tensor, rows: slice) -> list[slice]:
    """Return the columns to be multiplied at a time: all, unless their weights are widened."""
    return column_tiles(weight_VpH, rows) if is_widened(weight_VpH) else [slice(0, len(weight_VpH))]
