"""One step of an objective from both models' hidden states: logits, loss and gradients.

Shapes: N tokens, H hidden, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from logprob_cases import DTYPES, group_of_one
from torch import Tensor

from poweropd_megatron.objectives.sampled.power import power_reward
from poweropd_megatron.ops.fused_policy_gradient import fused_policy_gradient
from poweropd_megatron.ops.fused_vocabulary_gradient import fused_vocabulary_gradient
from poweropd_megatron.ops.lm_head import score
from poweropd_megatron.ops.lm_head_tiles import LMHead
from poweropd_megatron.ops.vocabulary_objectives import (
    ForwardKL,
    PowerExact,
    ReverseKL,
    TopKForwardKL,
    TopKReverseKL,
    VocabularyObjective,
)

_ALPHA = 1.0
"""Of random logits whose tokens have 1 in 150,000, a higher one leaves numbers that aren't normal
any more, with which a CPU multiplies many times slower."""
_REWARD = partial(power_reward, alpha=_ALPHA)
_TOP_K = 64
OBJECTIVES: dict[str, VocabularyObjective] = {
    "reverse_kl": ReverseKL(),
    "power_exact": PowerExact(_ALPHA),
    "forward_kl": ForwardKL(),
    "topk_reverse_kl": TopKReverseKL(_TOP_K),
    "topk_forward_kl": TopKForwardKL(_TOP_K),
}


class ObjectiveStep:
    """Forward and backward of one objective; the weight's gradient goes to a main_grad."""

    def __init__(
        self,
        loss: Callable[["ObjectiveStep"], Tensor],
        num_tokens: int,
        vocab_size: int,
        hidden_size: int,
        dtype: str,
        device: str,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def weight() -> Tensor:
            scaled = normal(vocab_size, hidden_size).mul_(1.5 / math.sqrt(hidden_size))
            return scaled.to(DTYPES[dtype])

        self.weight_VH = weight().requires_grad_()
        self.weight_VH.main_grad = torch.zeros_like(self.weight_VH, dtype=torch.float32)
        self.hidden_NH = normal(num_tokens, hidden_size).to(DTYPES[dtype]).requires_grad_()
        self.targets_N = torch.randint(
            vocab_size, (num_tokens,), generator=generator, device=device
        )
        self.teacher_logp_N = -math.log(vocab_size) + normal(num_tokens).clamp(max=3)
        self.teacher_weight_VH = weight()
        self.teacher_hidden_NH = normal(num_tokens, hidden_size).to(DTYPES[dtype])
        self._group = group_of_one(device)
        self._loss = loss
        self.steps = {"step": self._step}

    def head(self, weight_VH: Tensor) -> LMHead:
        """Return an output layer over the whole vocabulary."""
        return LMHead(weight_VpH=weight_VH, vocab_size=len(weight_VH), tp_group=self._group)

    def prepare(self) -> None:
        """Drop the last step's gradient of the hidden states."""
        self.hidden_NH.grad = None

    def _step(self) -> None:
        self._loss(self).backward()


def sampled(step: ObjectiveStep) -> Tensor:
    """Return the loss of the power reward at one token each."""
    head = step.head(step.weight_VH)
    return fused_policy_gradient(
        step.hidden_NH, head, step.targets_N, step.teacher_logp_N, _REWARD
    ).loss


def sampled_and_scored(step: ObjectiveStep) -> Tensor:
    """Return the same, the teacher's log-probs being computed from its hidden states."""
    head = step.head(step.teacher_weight_VH)
    step.teacher_logp_N = score(step.teacher_hidden_NH, head, step.targets_N).logp_N
    return sampled(step)


def exact(kind: str, step: ObjectiveStep) -> Tensor:
    """Return the loss of an objective over the whole vocabulary."""
    return fused_vocabulary_gradient(
        step.hidden_NH,
        step.head(step.weight_VH),
        step.teacher_hidden_NH,
        step.head(step.teacher_weight_VH),
        step.targets_N,
        OBJECTIVES[kind],
    ).loss


def dense(step: ObjectiveStep) -> Tensor:
    """Return the reverse KL as scripts write it: all logits of both models, and autograd."""
    student_NV = (step.hidden_NH @ step.weight_VH.t()).float().log_softmax(1)
    with torch.no_grad():
        teacher_NV = (step.teacher_hidden_NH @ step.teacher_weight_VH.t()).float().log_softmax(1)
    return (student_NV.exp() * (student_NV - teacher_NV)).sum()


LOSSES: dict[str, Callable[[ObjectiveStep], Tensor]] = {
    "power": sampled,
    "power, with scoring": sampled_and_scored,
    **{kind: partial(exact, kind) for kind in OBJECTIVES},
    "reverse_kl, dense": dense,
}
