"""What an update of the student did. Shapes: B sequences, T tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from poweropd_megatron.objectives.rewards import Reward


@dataclass(frozen=True, kw_only=True)
class StudentOutcome:
    """What one update did, the same on every rank.

    Of several optimizer steps, each sequence's values are those of the forward that it was learned
    from, grad_norm is the mean of theirs, and learning_rate the last.
    reward: what the tokens were rewarded with, a batch's statistics in place. weight_BT: what each
    reward was multiplied with, None where all are 1. variance: metrics of the first optimizer
    step's gradient, empty unless they were asked for.
    Shapes: logp_BT and entropy_BT fp32 on the CPU, 0 outside the loss.
    """

    logp_BT: Tensor
    entropy_BT: Tensor
    grad_norm: float
    learning_rate: float
    reward: Reward
    weight_BT: Tensor | None = None
    variance: Mapping[str, float] = field(default_factory=dict)


def join_outcomes(steps: Sequence[StudentOutcome]) -> StudentOutcome:
    """Return the outcome of optimizer steps on consecutive parts of a batch."""
    if len(steps) == 1:
        return steps[0]
    weights = [step.weight_BT for step in steps if step.weight_BT is not None]
    return StudentOutcome(
        logp_BT=torch.cat([step.logp_BT for step in steps]),
        entropy_BT=torch.cat([step.entropy_BT for step in steps]),
        grad_norm=sum(step.grad_norm for step in steps) / len(steps),
        learning_rate=steps[-1].learning_rate,
        reward=steps[0].reward,
        weight_BT=torch.cat(weights) if weights else None,
        variance=steps[0].variance,
    )
