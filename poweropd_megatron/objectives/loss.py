"""The policy-gradient loss of on-policy distillation.

Shapes: N tokens.
"""

import torch
from torch import Tensor


def policy_gradient_loss(student_logp_N: Tensor, reward_N: Tensor) -> Tensor:
    """Return - sum of reward * log p_S, a scalar whose gradient is that of the expected reward.

    The reward is held constant. The sum is divided by the token count of the whole global batch
    later, once, so the gradient doesn't depend on how the batch is split over micro-batches and
    ranks. Tokens with reward 0 have no gradient, even where log p_S is -inf.
    """
    reward_N = reward_N.detach()
    gains_N = torch.where(reward_N == 0, 0.0, reward_N * student_logp_N)
    return -gains_N.sum()
