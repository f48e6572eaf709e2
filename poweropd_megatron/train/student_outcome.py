"""What an update of the student did. Shapes: B sequences, T tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from poweropd_megatron.objectives.rewards import Reward
from poweropd_megatron.train.forward_step import MicroBatchResult


@dataclass(frozen=True, kw_only=True)
class StudentOutcome:
    """What one update did, the same on every rank.

    Of several optimizer steps, each sequence's values are those of the forward that it was learned
    from, grad_norm is the mean of theirs, and learning_rate the last.
    reward: what the tokens were rewarded with, a batch's statistics in place. weight_BT: what each
    token's loss was multiplied with, None where all are 1. loss_BT and full_kl_BT: of an objective
    over the whole vocabulary, its loss, and KL(student || teacher) in nats; else None. variance:
    metrics of the first optimizer step's gradient, empty unless they were asked for.
    Shapes: all _BT fp32 on the CPU, 0 outside the loss.
    """

    logp_BT: Tensor
    teacher_logp_BT: Tensor
    entropy_BT: Tensor
    grad_norm: float
    learning_rate: float
    reward: Reward
    weight_BT: Tensor | None = None
    loss_BT: Tensor | None = None
    full_kl_BT: Tensor | None = None
    variance: Mapping[str, float] = field(default_factory=dict)


_FOUND = {"logp_BT": "logp_N", "entropy_BT": "entropy_N"}
_COMPARED = {
    "teacher_logp_BT": "teacher_logp_N",
    "loss_BT": "loss_N",
    "full_kl_BT": "reverse_kl_N",
}
"""Names in StudentOutcome, and in what the heads return of a micro-batch."""


def own_findings(
    results: Sequence[MicroBatchResult], shape: torch.Size, *, is_compared: bool
) -> dict[str, Tensor]:
    """Return what this rank's micro-batches found of each token, [B, T], under StudentOutcome's
    names. is_compared: whether the objective is over the whole vocabulary.
    """
    names = _FOUND | _COMPARED if is_compared else _FOUND
    own = {name: torch.zeros(shape) for name in names}
    for micro_batch, result in results:
        for name, of_head in names.items():
            micro_batch.put(own[name], getattr(result, of_head))
    return own


def join_outcomes(steps: Sequence[StudentOutcome]) -> StudentOutcome:
    """Return the outcome of optimizer steps on consecutive parts of a batch."""
    if len(steps) == 1:
        return steps[0]
    return StudentOutcome(
        logp_BT=torch.cat([step.logp_BT for step in steps]),
        teacher_logp_BT=torch.cat([step.teacher_logp_BT for step in steps]),
        entropy_BT=torch.cat([step.entropy_BT for step in steps]),
        grad_norm=sum(step.grad_norm for step in steps) / len(steps),
        learning_rate=steps[-1].learning_rate,
        reward=steps[0].reward,
        weight_BT=_joined([step.weight_BT for step in steps]),
        loss_BT=_joined([step.loss_BT for step in steps]),
        full_kl_BT=_joined([step.full_kl_BT for step in steps]),
        variance=steps[0].variance,
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
