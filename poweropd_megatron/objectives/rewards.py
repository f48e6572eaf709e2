"""Token rewards: what the student gains by a token, from the teacher's and its own log-prob of it.

Each is of one token by itself, and 0 where both log-probs are equal, both of them -inf included.
The kernels behind them are in ops/rewards.py.
Shapes: teacher_logp and student_logp of one shape, fp32, natural logarithms, at most 0.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from poweropd_megatron.config.schema import ObjectiveConfig
from poweropd_megatron.ops.rewards import token_reward

Reward = Callable[[Tensor, Tensor], Tensor]
"""(teacher_logp, student_logp) -> reward, detached, of the same shape."""


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


def log_ratio_reward(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    """Return log p_T - log p_S: vanilla on-policy distillation, unbounded."""
    return token_reward("log_ratio", teacher_logp, student_logp)


def clip_reward(teacher_logp: Tensor, student_logp: Tensor, *, low: float, high: float) -> Tensor:
    """Return the log-ratio held to [low, high]."""
    return token_reward("clip", teacher_logp, student_logp, a=low, b=high)


def tanh_reward(teacher_logp: Tensor, student_logp: Tensor, *, tau: float) -> Tensor:
    """Return tanh(log-ratio / tau). Range: [-1, 1]."""
    return token_reward("tanh", teacher_logp, student_logp, a=tau)


def build_reward(objective: ObjectiveConfig) -> Reward:
    """Return the reward that the settings ask for."""
    match objective.kind:
        case "power":
            return partial(power_reward, alpha=objective.alpha)
        case "prob_diff":
            return partial(power_reward, alpha=1.0)
        case "sqrt_diff":
            return partial(power_reward, alpha=0.5)
        case "box_cox":
            return partial(box_cox_reward, alpha=objective.alpha)
        case "log_ratio":
            return log_ratio_reward
        case "clip":
            return partial(clip_reward, low=objective.clip_low, high=objective.clip_high)
        case "tanh":
            return partial(tanh_reward, tau=objective.tau)
