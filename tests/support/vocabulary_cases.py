"""Objectives over the whole vocabulary, and what fp64 autograd makes of them without any tiles.

Shapes: N tokens, H hidden of the student and G of the teacher, V vocabulary, Vp with padding.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from support.lm_head_cases import IGNORED, Batch, Case
from torch import Tensor

from poweropd_megatron.ops.vocabulary_objectives import (
    ForwardKL,
    PowerExact,
    ReverseKL,
    TopKForwardKL,
    TopKReverseKL,
    VocabularyObjective,
)

ALPHA, TOP_K = 0.7, 5
OBJECTIVES: Mapping[str, VocabularyObjective] = {
    "reverse_kl": ReverseKL(),
    "power_exact": PowerExact(ALPHA),
    "forward_kl": ForwardKL(),
    "topk_reverse_kl": TopKReverseKL(TOP_K),
    "topk_forward_kl": TopKForwardKL(TOP_K),
}
TEACHER_HIDDEN = 40


class TeacherPart(NamedTuple):
    """What the teacher brings."""

    hidden_NG: Tensor
    weight_VpG: Tensor


class Outcome(NamedTuple):
    """What comes out of an objective and its backward."""

    loss_N: Tensor
    reverse_kl_N: Tensor
    logp_N: Tensor
    teacher_logp_N: Tensor
    entropy_N: Tensor
    hidden_grad_NH: Tensor
    weight_grad_VpH: Tensor


def teacher_of(case: Case) -> TeacherPart:
    """Return a teacher for the case, of another width, its padding far from zero."""
    generator = torch.Generator().manual_seed(case.vocab_size + 1)
    hidden_NG = torch.randn(case.num_tokens, TEACHER_HIDDEN, generator=generator)
    weight_VpG = torch.randn(case.padded_size, TEACHER_HIDDEN, generator=generator)
    weight_VpG *= 3 / TEACHER_HIDDEN**0.5
    weight_VpG[case.vocab_size :] *= 1000
    return TeacherPart(hidden_NG.to(case.dtype), weight_VpG.to(case.dtype))


def dense(
    kind: str,
    case: Case,
    batch: Batch,
    teacher: TeacherPart,
    *,
    dtype: torch.dtype = torch.float64,
    logits_dtype: torch.dtype = torch.float64,
) -> Outcome:
    """Return what autograd gives with all logits at once, without the padding."""
    hidden_NH = batch.hidden_NH.to(dtype).requires_grad_()
    weight_VpH = batch.weight_VpH.to(dtype).requires_grad_()
    size = case.vocab_size
    student_NV = _logp(hidden_NH, weight_VpH[:size], logits_dtype)
    teacher_NV = _logp(teacher.hidden_NG, teacher.weight_VpG[:size], logits_dtype)
    is_live_N = batch.targets_N != IGNORED
    loss_N = torch.where(is_live_N, LOSSES[kind](student_NV, teacher_NV), 0.0)
    loss_N.sum().backward()
    targets_N1 = batch.targets_N.clamp(min=0)[:, None]
    values = [
        LOSSES["reverse_kl"](student_NV, teacher_NV),
        student_NV.gather(1, targets_N1)[:, 0],
        teacher_NV.gather(1, targets_N1)[:, 0],
        -(student_NV.exp() * student_NV).sum(1),
    ]
    return Outcome(
        loss_N.detach(),
        *(torch.where(is_live_N, value.detach(), 0.0) for value in values),
        hidden_grad_NH=hidden_NH.grad,
        weight_grad_VpH=weight_VpH.grad,
    )


def _logp(hidden_NH: Tensor, weight_VH: Tensor, logits_dtype: torch.dtype) -> Tensor:
    logits_NV = hidden_NH.to(logits_dtype) @ weight_VH.to(logits_dtype).T
    return (logits_NV.float() if logits_dtype == torch.bfloat16 else logits_NV).log_softmax(1)


def _reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(1)


def _forward_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    return _reverse_kl(teacher_NV, student_NV)


def _power_exact(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    reward_NV = (ALPHA * teacher_NV).exp() - (ALPHA * student_NV).exp()
    weight_NV = (student_NV.exp() * reward_NV).detach()
    return -(weight_NV * student_NV).sum(1)


def _topk_reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    return _reverse_kl(*_bucketed(student_NV, student_NV, teacher_NV))


def _topk_forward_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    return _forward_kl(*_bucketed(teacher_NV, student_NV, teacher_NV))


def _bucketed(chooser_NV: Tensor, *logps: Tensor) -> list[Tensor]:
    """Return log-probs of the chooser's top tokens, -1e3 elsewhere, and of the rest together."""
    kth_N1 = chooser_NV.topk(min(TOP_K, chooser_NV.shape[1]), dim=1).values[:, -1:]
    is_top_NV = chooser_NV >= kth_N1
    result = []
    for logp_NV in logps:
        rest_N1 = logp_NV.masked_fill(is_top_NV, -1e3).logsumexp(1, keepdim=True)
        result.append(torch.cat([logp_NV.masked_fill(~is_top_NV, -1e3), rest_N1], dim=1))
    return result


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "power_exact": _power_exact,
    "forward_kl": _forward_kl,
    "topk_reverse_kl": _topk_reverse_kl,
    "topk_forward_kl": _topk_forward_kl,
}
"""(student log-probs, teacher log-probs) -> loss of each token, differentiable."""
