"""Batches for the LM head, its three ways to train, and what fp64 autograd makes of them.

Shapes: N tokens, H hidden, V vocabulary, Vp columns of it with padding (of a rank or of all).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd_megatron.ops.fused_policy_gradient import fused_policy_gradient
from poweropd_megatron.ops.lm_head import materialized_logprob, recomputed_logprob
from poweropd_megatron.ops.lm_head_tiles import LMHead

HEADS = ("fused", "recompute", "materialized")
IGNORED = -100
Reward = Callable[[Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """What goes into the head; every third target is ignored where the case says so."""

    hidden_NH: Tensor
    weight_VpH: Tensor
    targets_N: Tensor
    teacher_logp_N: Tensor


class Outcome(NamedTuple):
    """What comes out of a loss and its backward."""

    loss: Tensor
    logp_N: Tensor
    entropy_N: Tensor
    hidden_grad_NH: Tensor
    weight_grad_VpH: Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """Some tokens, and a head whose padding columns are far from zero."""

    num_tokens: int = 53
    hidden_size: int = 24
    vocab_size: int = 300
    padded_size: int = 311
    dtype: torch.dtype = torch.float32
    logits_dtype: torch.dtype = torch.float32
    with_ignored: bool = False

    def batch(self) -> Batch:
        """Return tensors of the case's dtype, the outermost tokens among the targets."""
        generator = torch.Generator().manual_seed(self.vocab_size)
        hidden_NH = torch.randn(self.num_tokens, self.hidden_size, generator=generator)
        weight_VpH = torch.randn(self.padded_size, self.hidden_size, generator=generator)
        weight_VpH *= 3 / self.hidden_size**0.5
        weight_VpH[self.vocab_size :] *= 1000
        targets_N = torch.randint(self.vocab_size, (self.num_tokens,), generator=generator)
        targets_N[:1], targets_N[1:2] = 0, self.vocab_size - 1
        if self.with_ignored:
            targets_N[2::3] = IGNORED
        teacher_logp_N = -12 * torch.rand(self.num_tokens, generator=generator)
        return Batch(hidden_NH.to(self.dtype), weight_VpH.to(self.dtype), targets_N, teacher_logp_N)


def power(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    """Return p_T - p_S, in the dtype of the log-probs."""
    return (teacher_logp.exp() - student_logp.exp()).detach()


def leaves(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return copies of the hidden states and the weight that take gradients."""
    return (
        batch.hidden_NH.clone().requires_grad_(),
        batch.weight_VpH.clone().requires_grad_(),
    )


def loss_of(
    kind: str, hidden_NH: Tensor, head: LMHead, batch: Batch, reward: Reward
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, log-probs and entropies that one of HEADS gives."""
    targets_N, teacher_logp_N = batch.targets_N, batch.teacher_logp_N
    if kind == "fused":
        return fused_policy_gradient(hidden_NH, head, targets_N, teacher_logp_N, reward)
    logprob = {"recompute": recomputed_logprob, "materialized": materialized_logprob}[kind]
    logp_N, entropy_N = logprob(hidden_NH, head, targets_N)
    reward_N = torch.where(targets_N == IGNORED, 0.0, reward(teacher_logp_N, logp_N.detach()))
    return -(reward_N * logp_N).sum(), logp_N.detach(), entropy_N


def exact(case: Case, batch: Batch, reward: Reward = power) -> Outcome:
    """Return what autograd gives in fp64, without the padding and the ignored tokens."""
    return plain(case, batch, reward, torch.float64, torch.float64)


def plain(
    case: Case,
    batch: Batch,
    reward: Reward,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> Outcome:
    """Return what plain torch gives with a GEMM of `logits_dtype` over tensors of `dtype`."""
    hidden_NH = batch.hidden_NH.to(dtype).requires_grad_()
    weight_VpH = batch.weight_VpH.to(dtype).requires_grad_()
    is_live_N = batch.targets_N != IGNORED
    logits = hidden_NH.to(logits_dtype) @ weight_VpH[: case.vocab_size].to(logits_dtype).T
    if logits_dtype == torch.bfloat16:
        logits = logits.float()
    logp_NV = logits[is_live_N].log_softmax(dim=1)
    chosen_N = logp_NV.gather(1, batch.targets_N[is_live_N][:, None])[:, 0]
    reward_N = reward(batch.teacher_logp_N[is_live_N].to(chosen_N.dtype), chosen_N)
    loss = -(reward_N.detach() * chosen_N).sum()
    loss.backward()
    logp_N = chosen_N.new_zeros(len(is_live_N)).index_put((is_live_N,), chosen_N.detach())
    entropy_N = -(logp_NV.exp() * logp_NV).sum(dim=1).detach()
    return Outcome(
        loss=loss.detach(),
        logp_N=logp_N,
        entropy_N=entropy_N.new_zeros(len(is_live_N)).index_put((is_live_N,), entropy_N),
        hidden_grad_NH=hidden_NH.grad,
        weight_grad_VpH=weight_VpH.grad,
    )


def error(actual: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference over the norm of the truth, or its norm where that is 0."""
    assert actual.shape == truth.shape
    norm = float(truth.double().norm())
    return float((actual.double() - truth.double()).norm()) / (norm or 1.0)
