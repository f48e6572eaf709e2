"""A loss whose gradients over hidden states and head are made while it is computed.

Shapes: N tokens, H hidden, Vp columns of the vocabulary on this rank (padding included).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from poweropd_megatron.ops.lm_head_tiles import Gradients


def gradient_in_forward(
    hidden_NH: Tensor, weight_VpH: Tensor, visit: Callable[[Gradients | None], Tensor]
) -> Tensor:
    """Return the loss that `visit` computes, a differentiable scalar.

    `visit` is called once, at once and without autograd. It adds to the sums that it is given what
    each part of the tokens gives; None where no gradient is wanted.
    With a `main_grad` on the weight its gradient is added to that here, so the loss must be
    differentiated exactly once, with an upstream gradient of 1. That is asserted in backward, when
    main_grad has been written; a `visit` that raises leaves main_grad with what it has added.
    Either way, zero main_grad before going on.
    The gradient of hidden_NH is this rank's share, as for any column-parallel layer.
    """
    with_gradient = torch.is_grad_enabled() and (
        hidden_NH.requires_grad or weight_VpH.requires_grad
    )
    loss: Tensor = _GradientInForward.apply(hidden_NH, weight_VpH, visit, with_gradient)
    return loss


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VpH: Tensor,
        visit: Callable[[Gradients | None], Tensor],
        with_gradient: bool,
    ) -> Tensor:
        grads = Gradients(hidden_NH, weight_VpH) if with_gradient else None
        loss = visit(grads)
        if grads is not None:
            ctx.weight_is_done = grads.adds_to_main_grad
            ctx.is_differentiated = False
            ctx.save_for_backward(grads.hidden(), grads.weight())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
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
        return grad_hidden_NH, grad_weight_VpH, None, None
