"""The rewards as functions of two log-probs, against exact arithmetic."""

import math

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from poweropd_megatron.config.schema import ObjectiveConfig
from poweropd_megatron.objectives.rewards import build_reward
from poweropd_megatron.objectives.sampled.log_ratio import log_ratio_reward
from poweropd_megatron.objectives.sampled.power import power_reward

mpmath.mp.dps = 80

TINY = 2.0**-100
"""Below this, intermediate results are subnormal in fp32."""
log_probs = st.one_of(
    st.floats(-100, 0, width=32),
    st.floats(-(2.0**-10), 0, width=32),
    st.floats(max_value=0, width=32, allow_nan=False),
).map(lambda value: value + 0.0)
alphas = st.floats(0.05, 500)
many_examples = settings(max_examples=400)


@st.composite
def near_pairs(draw: st.DrawFn) -> tuple[float, float]:
    """Log-probs of likely tokens, a few units in the last place to a few per cent apart."""
    teacher = torch.tensor(draw(st.floats(-5, -(2.0**-10), width=32)))
    change = draw(st.floats(2.0**-23, 0.0625)) * draw(st.sampled_from([-1, 1]))
    student = torch.clamp(teacher * (1 + change), max=0)
    return teacher.item(), student.item()


def tensors(teacher: float, student: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([teacher]), torch.tensor([student])


def exact_power(teacher: float, student: float, alpha: float) -> mpmath.mpf:
    a, t, s = mpmath.mpf(alpha), mpmath.mpf(teacher), mpmath.mpf(student)
    return mpmath.exp(a * t) - mpmath.exp(a * s)


@many_examples
@given(teacher=log_probs, student=log_probs, alpha=alphas)
@example(teacher=0.0, student=-math.inf, alpha=500.0)
@example(teacher=-math.inf, student=0.0, alpha=0.05)
@example(teacher=-3.4028234663852886e38, student=-1e-45, alpha=500.0)
def test_power_reward_is_bounded_and_has_the_sign_of_the_difference(
    teacher: float, student: float, alpha: float
) -> None:
    reward = power_reward(*tensors(teacher, student), alpha=alpha).item()
    assert -1 <= reward <= 1
    truth = exact_power(teacher, student, alpha)
    if abs(truth) > TINY:
        assert math.copysign(1, reward) == mpmath.sign(truth)
    else:
        assert reward == 0 or math.copysign(1, reward) == mpmath.sign(truth)
    if teacher == student:
        assert reward == 0


@many_examples
@given(pair=st.one_of(near_pairs(), st.tuples(log_probs, log_probs)), alpha=alphas)
def test_power_reward_keeps_relative_accuracy_for_near_equal_probabilities(
    pair: tuple[float, float], alpha: float
) -> None:
    """The only rounding that grows is that of alpha * log p before the exponential."""
    truth = exact_power(*pair, alpha)
    reward = power_reward(*tensors(*pair), alpha=alpha).item()
    if abs(truth) > TINY:
        allowed = 2.0**-23 * (4 + alpha * abs(max(pair)))
        assert abs(reward - truth) <= allowed * abs(truth)
    else:
        assert abs(reward) <= 2 * TINY


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 100.0, 500.0])
def test_power_reward_is_the_naive_difference_of_powers(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = -3 * torch.rand(2, 4000, generator=generator)
    naive = teacher.double().exp() ** alpha - student.double().exp() ** alpha
    reward = power_reward(teacher, student, alpha=alpha)
    torch.testing.assert_close(reward.double(), naive, rtol=1e-4, atol=1e-30)


def test_naive_fp32_loses_what_power_reward_keeps() -> None:
    teacher = torch.tensor([-0.5])
    student = torch.nextafter(teacher, torch.tensor([-1.0]))
    truth = exact_power(teacher.item(), student.item(), 1.0)
    naive = (teacher.exp() - student.exp()).item()
    assert abs(naive - truth) > 0.1 * truth
    assert power_reward(teacher, student, alpha=1.0).item() == pytest.approx(float(truth), rel=1e-6)


@given(value=log_probs, alpha=alphas)
@example(value=-math.inf, alpha=5.0)
@example(value=0.0, alpha=5.0)
def test_equal_log_probs_are_rewarded_with_exactly_zero(value: float, alpha: float) -> None:
    pair = tensors(value, value)
    assert power_reward(*pair, alpha=alpha).item() == 0
    assert log_ratio_reward(*pair).item() == 0


def test_power_reward_reaches_its_bounds_for_certain_against_impossible() -> None:
    teacher = torch.tensor([0.0, -math.inf])
    reward = power_reward(teacher, teacher.flip(0), alpha=5.0)
    assert reward.tolist() == [1.0, -1.0]


@given(teacher=st.floats(-(2.0**100), 0, width=32), student=st.floats(-(2.0**100), 0, width=32))
def test_log_ratio_reward_is_the_difference_of_log_probs(teacher: float, student: float) -> None:
    reward = log_ratio_reward(*tensors(teacher, student)).item()
    assert reward == torch.tensor(teacher - student).float().item()


def test_log_ratio_reward_is_infinite_where_one_model_finds_the_token_impossible() -> None:
    reward = log_ratio_reward(torch.tensor([-math.inf, -1.0]), torch.tensor([-1.0, -math.inf]))
    assert reward.tolist() == [-math.inf, math.inf]


@pytest.mark.parametrize("kind", ["power", "log_ratio"])
def test_rewards_are_constants_to_autograd(kind: str) -> None:
    teacher = torch.tensor([-1.0, -2.0], requires_grad=True)
    student = torch.tensor([-2.0, -1.0], requires_grad=True)
    reward = build_reward(ObjectiveConfig(kind=kind))(teacher, student)
    assert not reward.requires_grad


@pytest.mark.parametrize("kind", ["power", "log_ratio"])
def test_a_nan_log_prob_is_not_hidden(kind: str) -> None:
    nan, fine = torch.tensor([math.nan]), torch.tensor([-1.0])
    reward = build_reward(ObjectiveConfig(kind=kind))
    assert reward(nan, fine).isnan().item()
    assert reward(fine, nan).isnan().item()


def test_the_settings_choose_the_reward_and_its_alpha() -> None:
    pair = tensors(math.log(0.6), math.log(0.5))
    power = build_reward(ObjectiveConfig(kind="power", alpha=2.0))(*pair)
    assert power.item() == pytest.approx(0.36 - 0.25, rel=1e-6)
    log_ratio = build_reward(ObjectiveConfig(kind="log_ratio"))(*pair)
    assert log_ratio.item() == pytest.approx(math.log(1.2), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_alpha_that_is_not_positive_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha must be > 0 .*, got {alpha}; .* use log_ratio"):
        power_reward(*tensors(-1.0, -2.0), alpha=alpha)
