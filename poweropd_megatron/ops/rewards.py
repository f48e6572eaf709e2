"""Rewards that depend on one token's two log-probs alone."""

import torch
from torch import Tensor

from poweropd_megatron.ops.arguments import check_dense
from poweropd_megatron.ops.backends import kernels_for

REWARD_KINDS = ("power", "box_cox", "log_ratio", "clip", "tanh")
"""In the order of csrc/numerics.h."""
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""Of the numbers that the kernels, which take fp32, can divide by and multiply with."""


def token_reward(
    kind: str, teacher_logp: Tensor, student_logp: Tensor, *, a: float = 0.0, b: float = 0.0
) -> Tensor:
    """Return the reward of each token, fp32, detached; 0 for equal log-probs, also both -inf.

    power: p_T^a - p_S^a; box_cox: (p_T^a - p_S^a) / a; log_ratio: log p_T - log p_S; clip: the
    log-ratio held to [a, b]; tanh: tanh(log-ratio / a). A NaN on either side gives NaN; log-probs
    above 0, which rounding can make, are taken as they are.
    Shapes: both of one shape and device, fp32 natural logarithms.
    Raises: ValueError naming what doesn't fit: a tensor, the kind, or a parameter.
    """
    if kind not in REWARD_KINDS:
        raise ValueError(f"kind must be one of {', '.join(REWARD_KINDS)}, got {kind!r}")
    for name, parameter in (("a", a), ("b", b)):
        if not isinstance(parameter, int | float) or isinstance(parameter, bool):
            raise ValueError(f"{name} of {kind} must be a number, got {parameter!r}")
    if kind in ("power", "box_cox") and not _SMALLEST <= a <= _LARGEST:
        raise ValueError(
            f"alpha must be > 0 and finite in fp32, got {a}; for the limit 0 use log_ratio"
        )
    if kind == "tanh" and not _SMALLEST <= a <= _LARGEST:
        raise ValueError(f"tau must be > 0 and finite in fp32, got {a}")
    if kind == "clip" and not a <= b:
        raise ValueError(f"the bounds of clip must be ascending, got {a} and {b}")
    for name, logp in (("teacher_logp", teacher_logp), ("student_logp", student_logp)):
        check_dense(name, logp)
        if logp.dtype != torch.float32:
            raise ValueError(f"{name} must be fp32, got {logp.dtype}")
    if teacher_logp.shape != student_logp.shape or teacher_logp.device != student_logp.device:
        raise ValueError(
            f"teacher_logp is {tuple(teacher_logp.shape)} on {teacher_logp.device}, student_logp "
            f"{tuple(student_logp.shape)} on {student_logp.device}: they must be alike"
        )
    if student_logp.is_meta:
        raise ValueError("student_logp is on meta, expected a device with memory")
    return kernels_for(student_logp).token_reward(
        kind, teacher_logp.detach().contiguous(), student_logp.detach().contiguous(), a=a, b=b
    )
