"""Token rewards: what the student gains by a token, from the teacher's and its own log-prob of it.

Shapes: N tokens. All log-probs are natural, fp32, at most 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from poweropd_megatron.config.schema import ObjectiveConfig

Reward = Callable[[Tensor, Tensor], Tensor]
"""(teacher_logp_N, student_logp_N) -> reward_N, detached."""


def power_reward(teacher_logp_N: Tensor, student_logp_N: Tensor, *, alpha: float) -> Tensor:
    """Return p_T**alpha - p_S**alpha for each token, detached.

    Range: [-1, 1], with the sign of p_T - p_S; 0 for equal log-probs, both of them -inf included.
    Raises: ValueError if alpha <= 0 (the limit alpha -> 0 is the log-ratio: use that reward).
    Source: PowerOPD, eq. 4, in the form sign(d) exp(alpha max) (1 - exp(-alpha |d|)) with d = log
    p_T - log p_S: near-equal probabilities keep their relative accuracy, and no exponential
    overflows.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}; for the log-ratio limit use log_ratio")
    larger_N = torch.maximum(teacher_logp_N, student_logp_N).detach()
    difference_N = log_ratio_reward(teacher_logp_N, student_logp_N)
    size_N = torch.exp(alpha * larger_N) * -torch.expm1(-alpha * difference_N.abs())
    return torch.sign(difference_N) * size_N


def log_ratio_reward(teacher_logp_N: Tensor, student_logp_N: Tensor) -> Tensor:
    """Return log p_T - log p_S for each token, detached: vanilla on-policy distillation, unbounded.

    0 where both are -inf.
    """
    teacher_logp_N, student_logp_N = teacher_logp_N.detach(), student_logp_N.detach()
    equal_N = teacher_logp_N == student_logp_N
    return torch.where(equal_N, 0.0, teacher_logp_N - student_logp_N)


def build_reward(objective: ObjectiveConfig) -> Reward:
    """Return the reward that the settings ask for."""
    if objective.kind == "power":
        alpha = objective.alpha
        return lambda teacher, student: power_reward(teacher, student, alpha=alpha)
    return log_ratio_reward
