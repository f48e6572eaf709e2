"""One policy-gradient step of the LM head: hidden states in, gradients out.

All three ways use the same row kernels; they differ in how many logits exist at a time and in how
often these are computed.
Shapes: N tokens, H hidden, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from logprob_cases import DTYPES, group_of_one
from torch import Tensor

from poweropd_megatron.objectives.loss import policy_gradient_loss
from poweropd_megatron.objectives.sampled.power import power_reward
from poweropd_megatron.ops.fused_policy_gradient import fused_policy_gradient
from poweropd_megatron.ops.lm_head import materialized_logprob, recomputed_logprob
from poweropd_megatron.ops.lm_head_tiles import LMHead
from poweropd_megatron.ops.logprob import TokenLogprobs

_REWARD = partial(power_reward, alpha=1.0)


class HeadStep:
    """Forward and backward of one way; the weight's gradient goes to a main_grad made before."""

    def __init__(
        self,
        loss: Callable[[Tensor, LMHead, Tensor, Tensor], Tensor],
        num_tokens: int,
        vocab_size: int,
        hidden_size: int,
        dtype: str,
        device: str,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        weight_VH = normal(vocab_size, hidden_size).mul_(1.5 / math.sqrt(hidden_size))
        weight_VH = weight_VH.to(DTYPES[dtype]).requires_grad_()
        weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
        self._hidden_NH = normal(num_tokens, hidden_size).to(DTYPES[dtype]).requires_grad_()
        self._targets_N = torch.randint(
            vocab_size, (num_tokens,), generator=generator, device=device
        )
        self._teacher_logp_N = -math.log(vocab_size) + normal(num_tokens).clamp(max=3)
        group = group_of_one(device)
        self._head = LMHead(weight_VpH=weight_VH, vocab_size=vocab_size, tp_group=group)
        self._loss = loss
        self.steps = {"step": self._step}

    def prepare(self) -> None:
        """Drop the last step's gradient of the hidden states."""
        self._hidden_NH.grad = None

    def _step(self) -> None:
        loss = self._loss(self._hidden_NH, self._head, self._targets_N, self._teacher_logp_N)
        loss.backward()


def fused(hidden_NH: Tensor, head: LMHead, targets_N: Tensor, teacher_logp_N: Tensor) -> Tensor:
    """Return the loss whose gradients are made in one visit of each token."""
    return fused_policy_gradient(hidden_NH, head, targets_N, teacher_logp_N, _REWARD).loss


def recomputed(
    hidden_NH: Tensor, head: LMHead, targets_N: Tensor, teacher_logp_N: Tensor
) -> Tensor:
    """Return the loss whose backward computes the logits again, tile by tile."""
    return _loss(recomputed_logprob(hidden_NH, head, targets_N), teacher_logp_N)


def materialized(
    hidden_NH: Tensor, head: LMHead, targets_N: Tensor, teacher_logp_N: Tensor
) -> Tensor:
    """Return the loss with all logits kept for the backward."""
    return _loss(materialized_logprob(hidden_NH, head, targets_N), teacher_logp_N)


def _loss(student: TokenLogprobs, teacher_logp_N: Tensor) -> Tensor:
    reward_N = _REWARD(teacher_logp_N, student.logp_N.detach())
    return policy_gradient_loss(student.logp_N, reward_N)
