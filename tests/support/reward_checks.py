"""What holds of every back-end's token rewards, against fp64 arithmetic."""

import math

import torch
from support.row_checks import RowBackend, assert_within
from torch import Tensor

ALPHAS = (1e-4, 0.1, 1.0, 5.0, 20.0, 500.0)
TINY = 2.0**-123
"""Below this, intermediate results are subnormal in fp32."""


def log_prob_pairs() -> tuple[Tensor, Tensor]:
    """Return log-probs of the teacher and the student: far, near, equal, and at the limits."""
    generator = torch.Generator().manual_seed(0)
    far = -torch.rand(2, 300, generator=generator) * torch.logspace(-4, 3, 300)
    teacher = -4 * torch.rand(300, generator=generator) - 2.0**-10
    change = torch.logspace(-7, -1, 300) * torch.randn(300, generator=generator).sign()
    near = torch.stack([teacher, teacher * (1 + change)])
    next_to_each_other = torch.stack([teacher, torch.nextafter(teacher, torch.zeros(300))])
    never, certain = -math.inf, 0.0
    limits = torch.tensor(
        [
            [never, certain, never, -1.0, never, certain, -1.0, -104.0, math.nan, -1.0],
            [certain, never, -1.0, never, never, certain, -1.0, -104.0, -1.0, math.nan],
        ]
    )
    teacher_logp_N, student_logp_N = torch.cat([far, near, next_to_each_other, limits], 1)
    return teacher_logp_N.contiguous(), student_logp_N.contiguous()


def power_difference(teacher_N: Tensor, student_N: Tensor, alpha: float) -> Tensor:
    """Return p_T**alpha - p_S**alpha in fp64, by way of sinh where the two are close."""
    near_N = 2 * (alpha * (teacher_N + student_N) / 2).exp()
    near_N *= (alpha * (teacher_N - student_N) / 2).sinh()
    far_N = (alpha * teacher_N).exp() - (alpha * student_N).exp()
    return torch.where(alpha * (teacher_N - student_N).abs() < 1, near_N, far_N)


def check_rewards(backend: RowBackend, device: str = "cpu") -> None:
    """Check each kind of reward, and that equal log-probs are rewarded with exactly zero."""
    teacher_N, student_N = log_prob_pairs()
    equal_N = teacher_N == student_N

    def reward(kind: str, a: float = 0.0, b: float = 0.0) -> Tensor:
        pair = teacher_N.to(device), student_N.to(device)
        reward_N = backend.token_reward(kind, *pair, a=a, b=b).cpu()
        assert reward_N.dtype == torch.float32
        assert (reward_N[equal_N] == 0).all(), f"{kind}: equal log-probs have a reward"
        return reward_N

    pair = teacher_N.double(), student_N.double()
    for alpha in ALPHAS:
        expected_N = power_difference(*pair, alpha)
        _check(reward("power", alpha), expected_N, f"power of {alpha}")
        _check(reward("box_cox", alpha), expected_N / alpha, f"box_cox of {alpha}", 1 / alpha)
    difference_N = torch.where(equal_N, 0, pair[0] - pair[1])
    _check(reward("log_ratio"), difference_N, "log_ratio")
    _check(reward("clip", -0.5, 2.0), difference_N.clamp(-0.5, 2.0), "clip")
    _check(reward("tanh", 3.0), (difference_N / 3).tanh(), "tanh")

    nothing_N = teacher_N[:0].to(device)
    assert backend.token_reward("power", nothing_N, nothing_N, a=1.0).shape == (0,)


def _check(reward_N: Tensor, expected_N: Tensor, what: str, unit: float = 1.0) -> None:
    """A relative error of 5e-6 is that of alpha * log p in fp32 before the exponential."""
    assert_within(reward_N, expected_N, 5e-6 * expected_N.abs() + TINY * unit, what)
    told_N = expected_N.abs() > TINY * unit
    assert (reward_N.sign() == expected_N.sign())[told_N].all(), f"{what}: a wrong sign"
