"""A fixed punishment of unlikely tokens: what is left of the objective without a teacher."""

import math
from functools import partial

import torch
from torch import Tensor

from poweropd_megatron.config.objective import ObjectiveConfig
from poweropd_megatron.objectives.rewards import Reward, register


def constant_negative_reward(
    _teacher_logp: Tensor, student_logp: Tensor, *, low_probability: float
) -> Tensor:
    """Return -1 for tokens that the student gives less than low_probability, 0 for others.

    An ablation: it asks whether the teacher is needed at all, and takes nothing from it. A NaN of
    the student stays one.
    Source: arXiv 2608.31046, a fixed negative advantage on low-probability tokens.
    """
    student_logp = student_logp.detach()
    punished = torch.where(student_logp < math.log(low_probability), -1.0, 0.0)
    return torch.where(student_logp.isnan(), student_logp, punished)


@register("constant_negative")
def _constant_negative(objective: ObjectiveConfig) -> Reward:
    return partial(constant_negative_reward, low_probability=objective.low_probability)
