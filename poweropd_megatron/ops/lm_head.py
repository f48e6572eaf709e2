"""The LM head and the log-prob in one: hidden states in, log-probs out.

`score` and `recomputed_logprob` never hold more than a tile of logits, `materialized_logprob` all
of this rank's. The gradient of the hidden states is this rank's share in each: the ranks' shares
have to be added, as for any column-parallel layer.
Shapes: N tokens, H hidden, Vp columns of the vocabulary on this rank (padding included).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from poweropd_megatron.ops.backends import IGNORED_TARGET, Softmaxes, kernels_for
from poweropd_megatron.ops.lm_head_tiles import Gradients, LMHead, Tile, logit_tiles
from poweropd_megatron.ops.logprob import (
    TokenLogprobs,
    vocab_parallel_logprob,
)
from poweropd_megatron.ops.matmul import product


@torch.no_grad()
def score(
    hidden_NH: Tensor, head: LMHead, targets_N: Tensor, *, with_entropy: bool = False
) -> Softmaxes:
    """Return the softmax of each token at its target, from one tile of logits at a time.

    Shapes: hidden_NH [N, H], targets_N [N] int64 in [0, vocab_size) or -100 (ignored).
    Memory: a tile, whatever N and Vp, and 16 bytes a token and rank.
    Cost: one GEMM; one all_gather of 16 bytes a token.
    Raises: ValueError naming the tensor that doesn't fit.
    """
    head.check(hidden_NH, targets_N)
    targets_N = targets_N.contiguous()
    kernels = kernels_for(hidden_NH)
    stats_N4 = hidden_NH.new_tensor([-torch.inf, 0, -torch.inf, 0], dtype=torch.float32)
    stats_N4 = stats_N4.repeat(len(hidden_NH), 1)
    for tile in logit_tiles(hidden_NH, head):
        kernels.row_stats(
            tile.logits,
            targets_N[tile.rows],
            first_column=head.first_column + tile.columns.start,
            vocab_size=head.vocab_size,
            with_entropy=with_entropy,
            stats_N4=stats_N4[tile.rows],
        )
    return head.combine(stats_N4, targets_N, with_entropy=with_entropy)


def recomputed_logprob(hidden_NH: Tensor, head: LMHead, targets_N: Tensor) -> TokenLogprobs:
    """Return log p(target) and the entropy of each token; the logits are made again for backward.

    Rows that are ignored are multiplied like the others, in backward too, so NaN in their hidden
    states would reach the weight's gradient: leave them out.
    Memory, cost forward: as `score`. Backward: three GEMMs, a tile of logits, no collective.
    Raises: ValueError naming the tensor that doesn't fit.
    """
    head.check(hidden_NH, targets_N)
    logp_N, entropy_N = _RecomputedLogprob.apply(
        hidden_NH, head.weight_VpH, targets_N.contiguous(), head
    )
    return TokenLogprobs(logp_N, entropy_N)


def materialized_logprob(hidden_NH: Tensor, head: LMHead, targets_N: Tensor) -> TokenLogprobs:
    """Return log p(target) and the entropy of each token, from all logits of this rank at once.

    Rows that are ignored are multiplied like the others, in backward too, so NaN in their hidden
    states would reach the weight's gradient: leave them out.
    Memory: [N, Vp] in the head's logits_dtype, which the gradient overwrites.
    Cost: three GEMMs; one all_gather of 16 bytes a token.
    Raises: ValueError naming the tensor that doesn't fit.
    """
    head.check(hidden_NH, targets_N)
    return vocab_parallel_logprob(
        _Logits.apply(hidden_NH, head.weight_VpH, head),
        targets_N,
        vocab_size=head.vocab_size,
        tp_group=head.tp_group,
        inplace_backward=True,
    )


class _RecomputedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VpH: Tensor, targets_N: Tensor, head: LMHead
    ) -> tuple[Tensor, Tensor]:
        softmax = score(hidden_NH, head, targets_N, with_entropy=True)
        ctx.save_for_backward(hidden_NH, weight_VpH, targets_N, *softmax[2:])
        ctx.head = head
        assert softmax.entropy_N is not None
        ctx.mark_non_differentiable(softmax.entropy_N)
        return softmax.logp_N, softmax.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VpH, targets_N, maximum_N, inverse_sum_N = ctx.saved_tensors
        head, kernels = ctx.head, kernels_for(hidden_NH)
        grad_N = torch.where(targets_N == IGNORED_TARGET, 0.0, grad_N)
        grads = Gradients(hidden_NH, weight_VpH)
        for tile in logit_tiles(hidden_NH, head):
            kernels.row_grad_(
                tile.logits,
                targets_N[tile.rows],
                maximum_N=maximum_N[tile.rows],
                inverse_sum_N=inverse_sum_N[tile.rows],
                grad_N=grad_N[tile.rows],
                first_column=head.first_column + tile.columns.start,
                vocab_size=head.vocab_size,
            )
            grads.add(tile)
        return grads.hidden(), grads.weight(), None, None


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VpH: Tensor, head: LMHead) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VpH)
        logits_NVp = hidden_NH.new_empty(len(hidden_NH), len(weight_VpH), dtype=head.logits_dtype)
        product(hidden_NH, weight_VpH.t(), out=logits_NVp)
        return logits_NVp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NVp: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VpH = ctx.saved_tensors
        grads = Gradients(hidden_NH, weight_VpH)
        grads.add(Tile(slice(None), slice(None), hidden_NH, weight_VpH, grad_NVp))
        return grads.hidden(), grads.weight(), None
