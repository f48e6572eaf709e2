"""Rewards that depend on one token's two log-probs alone.

Shapes: N tokens. Log-probs are natural, fp32, at most 0.
"""

import math

import torch
from torch import Tensor

from poweropd_megatron.ops.backends import kernels_for

REWARD_KINDS = ("power", "box_cox", "log_ratio", "clip", "tanh")
"""In the order of csrc/numerics.h."""


def token_reward(
    kind: str, teacher_logp_N: Tensor, student_logp_N: Tensor, *, a: float = 0.0, b: float = 0.0
) -> Tensor:
    """Return the reward of each token, [N] fp32, detached; 0 for equal log-probs, also both -inf.

    power: p_T^a - p_S^a; box_cox: (p_T^a - p_S^a) / a; log_ratio: log p_T - log p_S; clip: the
    log-ratio held to [a, b]; tanh: tanh(log-ratio / a). A NaN on either side gives NaN.
    Raises: ValueError for tensors that aren't two fp32 vectors of one shape and device, an unknown
    kind, a <= 0 where it is an exponent or a scale, or bounds a > b.
    """
    if kind not in REWARD_KINDS:
        raise ValueError(f"kind must be one of {', '.join(REWARD_KINDS)}, got {kind!r}")
    if kind in ("power", "box_cox", "tanh") and not 0 < a < math.inf:
        name = "tau" if kind == "tanh" else "alpha"
        raise ValueError(f"{kind} needs {name} (a) > 0 and finite, got {a}")
    if kind == "clip" and not a <= b:
        raise ValueError(f"clip needs a <= b, got [{a}, {b}]")
    for name, logp in (("teacher_logp_N", teacher_logp_N), ("student_logp_N", student_logp_N)):
        if logp.dim() != 1 or logp.dtype != torch.float32:
            raise ValueError(f"{name} must be [N] fp32, got {tuple(logp.shape)} {logp.dtype}")
    if teacher_logp_N.shape != student_logp_N.shape:
        raise ValueError(
            f"teacher_logp_N has {len(teacher_logp_N)} tokens, student_logp_N {len(student_logp_N)}"
        )
    if teacher_logp_N.device != student_logp_N.device:
        raise ValueError(
            f"teacher_logp_N is on {teacher_logp_N.device}, student_logp_N on "
            f"{student_logp_N.device}"
        )
    return kernels_for(student_logp_N).token_reward(
        kind,
        teacher_logp_N.detach().contiguous(),
        student_logp_N.detach().contiguous(),
        a=a,
        b=b,
    )
