"""Rewards of each sign brought to at most 1 over the batch. Shapes: N tokens."""

from functools import partial

import torch
from torch import Tensor

from poweropd_megatron.objectives.rewards import Reward

SMALLEST_SCALE = 1e-8
"""Rewards that are all smaller are not blown up."""


def fit_sign_max_abs(reward: Reward, teacher_logp_N: Tensor, student_logp_N: Tensor) -> Reward:
    """Return the reward divided by the largest of its sign among these tokens.

    Range: [-1, 1] on these tokens; signs stay. A sign that no token has stays as it is.
    Source: PowerOPD's released trainer, reward_normalization.
    """
    reward_N = reward(teacher_logp_N, student_logp_N)
    largest = reward_N.max().item() if len(reward_N) else 0.0
    smallest = reward_N.min().item() if len(reward_N) else 0.0
    return partial(_sign_max_abs, reward, _scale(largest), _scale(-smallest))


def _scale(extreme: float) -> float:
    """Return what to divide by; a NaN among the rewards stays one."""
    return 1.0 if extreme <= 0 else max(extreme, SMALLEST_SCALE)


def _sign_max_abs(
    reward: Reward,
    of_gains: float,
    of_losses: float,
    teacher_logp: Tensor,
    student_logp: Tensor,
) -> Tensor:
    value = reward(teacher_logp, student_logp)
    return torch.where(value > 0, value / of_gains, value / of_losses)
