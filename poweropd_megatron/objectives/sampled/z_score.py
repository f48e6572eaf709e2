"""Rewards brought to mean 0 and standard deviation 1 over the batch. Shapes: N tokens."""

from functools import partial

import torch
from torch import Tensor

from poweropd_megatron.config.objective import ObjectiveConfig
from poweropd_megatron.models.finite import check_finite
from poweropd_megatron.objectives.rewards import BatchReward, Reward, register
from poweropd_megatron.objectives.sampled.log_ratio import log_ratio_reward

SMALLEST_STD = 1e-8
"""Rewards that differ by less are not blown up."""


def fit_z_score(reward: Reward, teacher_logp_N: Tensor, student_logp_N: Tensor) -> Reward:
    """Return (reward - mean) / std, with the mean and the population's std of these tokens.

    Unbounded, and with the sign of reward - mean: a token that the teacher prefers may be punished.
    Without tokens, the reward as it is.
    Raises: NonFiniteError if a token's reward isn't finite.
    Source: PowerOPD, table 1; its released trainer has the same std and smallest std.
    """
    if not len(teacher_logp_N):
        return reward
    std, mean = torch.std_mean(reward(teacher_logp_N, student_logp_N).double(), correction=0)
    advice = (
        "the weights were not changed. A reward is infinite where one model finds a token "
        "impossible: use one that is bounded, such as objective.kind = 'power'"
    )
    check_finite("mean and deviation of the rewards", torch.stack([mean, std]), advice)
    return partial(_z_score, reward, mean.item(), max(std.item(), SMALLEST_STD))


def _z_score(
    reward: Reward, mean: float, std: float, teacher_logp: Tensor, student_logp: Tensor
) -> Tensor:
    return (reward(teacher_logp, student_logp) - mean) / std


@register("z_score")
def _z_score_of_log_ratio(_: ObjectiveConfig) -> BatchReward:
    return BatchReward(partial(fit_z_score, log_ratio_reward))
