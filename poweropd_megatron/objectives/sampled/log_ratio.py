"""The log-ratio of vanilla on-policy distillation, and two ways to bound it after the fact.

All are 0 where the two log-probs are equal, both of them -inf included.
"""

from functools import partial

from torch import Tensor

from poweropd_megatron.config.objective import ObjectiveConfig
from poweropd_megatron.objectives.rewards import Reward, register
from poweropd_megatron.ops.rewards import token_reward


def log_ratio_reward(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    """Return log p_T - log p_S: vanilla on-policy distillation, unbounded."""
    return token_reward("log_ratio", teacher_logp, student_logp)


def clip_reward(teacher_logp: Tensor, student_logp: Tensor, *, low: float, high: float) -> Tensor:
    """Return the log-ratio held to [low, high]."""
    return token_reward("clip", teacher_logp, student_logp, a=low, b=high)


def tanh_reward(teacher_logp: Tensor, student_logp: Tensor, *, tau: float) -> Tensor:
    """Return tanh(log-ratio / tau). Range: [-1, 1]."""
    return token_reward("tanh", teacher_logp, student_logp, a=tau)


@register("log_ratio")
def _log_ratio(_: ObjectiveConfig) -> Reward:
    return log_ratio_reward


@register("clip")
def _clip(objective: ObjectiveConfig) -> Reward:
    return partial(clip_reward, low=objective.clip_low, high=objective.clip_high)


@register("tanh")
def _tanh(objective: ObjectiveConfig) -> Reward:
    return partial(tanh_reward, tau=objective.tau)
