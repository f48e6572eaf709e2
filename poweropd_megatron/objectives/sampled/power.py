"""PowerOPD's reward, and those that differ from it by alpha or by a factor.

Both are 0 where the two log-probs are equal, both of them -inf included.
"""

from functools import partial

from torch import Tensor

from poweropd_megatron.config.objective import ObjectiveConfig
from poweropd_megatron.objectives.rewards import Reward, register
from poweropd_megatron.ops.rewards import token_reward


def power_reward(teacher_logp: Tensor, student_logp: Tensor, *, alpha: float) -> Tensor:
    """Return p_T**alpha - p_S**alpha for each token, detached.

    Range: [-1, 1], with the sign of p_T - p_S.
    Raises: ValueError if alpha <= 0 (the limit alpha -> 0 is the log-ratio: use that reward).
    Source: PowerOPD, eq. 4, in the form sign(d) exp(alpha max) (1 - exp(-alpha |d|)) with d = log
    p_T - log p_S: near-equal probabilities keep their relative accuracy, and no exponential
    overflows. alpha 1 is the difference of probabilities, 0.5 that of their square roots.
    """
    return token_reward("power", teacher_logp, student_logp, a=alpha)


def box_cox_reward(teacher_logp: Tensor, student_logp: Tensor, *, alpha: float) -> Tensor:
    """Return (p_T**alpha - p_S**alpha) / alpha: the log-ratio as alpha -> 0. Range: +-1 / alpha."""
    return token_reward("box_cox", teacher_logp, student_logp, a=alpha)


@register("power")
def _power(objective: ObjectiveConfig) -> Reward:
    return partial(power_reward, alpha=objective.alpha)


@register("prob_diff")
def _prob_diff(_: ObjectiveConfig) -> Reward:
    return partial(power_reward, alpha=1.0)


@register("sqrt_diff")
def _sqrt_diff(_: ObjectiveConfig) -> Reward:
    return partial(power_reward, alpha=0.5)


@register("box_cox")
def _box_cox(objective: ObjectiveConfig) -> Reward:
    return partial(box_cox_reward, alpha=objective.alpha)
