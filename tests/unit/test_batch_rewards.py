"""Rewards with statistics of the batch, and the one without a teacher, against their equations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.exact_objective import exact_rewards, normalized
from torch import Tensor

from poweropd_megatron.config.objective import KINDS, ObjectiveConfig
from poweropd_megatron.errors import NonFiniteError
from poweropd_megatron.objectives.rewards import BatchReward, Reward, build_reward, builders
from poweropd_megatron.objectives.sampled.constant_negative import constant_negative_reward

BOUNDS = {
    "power": lambda _: (-1.0, 1.0),
    "prob_diff": lambda _: (-1.0, 1.0),
    "sqrt_diff": lambda _: (-1.0, 1.0),
    "box_cox": lambda objective: (-1 / objective.alpha, 1 / objective.alpha),
    "clip": lambda objective: (objective.clip_low, objective.clip_high),
    "tanh": lambda _: (-1.0, 1.0),
}
"""P1 of the paper: the rewards that are bounded on [0, 1]^2, and by what."""
SIGN_CONSISTENT = (*BOUNDS, "log_ratio")
"""P2 of the paper: the rewards with the sign of p_T - p_S."""
log_probs = st.one_of(
    st.floats(-60, 0, width=32), st.floats(-(2.0**-8), 0, width=32), st.just(-math.inf)
).map(lambda value: value + 0.0)


def pair(teacher: float, student: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([teacher]), torch.tensor([student])


def batch(count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = -4 * torch.rand(2, count, generator=generator)
    return teacher, student


def fitted(objective: ObjectiveConfig, teacher: Tensor, student: Tensor) -> Reward:
    reward = build_reward(objective)
    return reward.fit(teacher, student) if isinstance(reward, BatchReward) else reward


def test_every_kind_of_the_settings_has_a_reward_and_no_other_has() -> None:
    sampled = [kind for kind, known in KINDS.items() if known.family == "sampled"]
    assert sorted(builders()) == sorted(sampled)


@pytest.mark.parametrize("kind", SIGN_CONSISTENT)
@given(
    teacher=log_probs,
    student=log_probs,
    alpha=st.floats(0.01, 500),
    tau=st.floats(0.01, 100),
    low=st.floats(-50, -0.01),
    high=st.floats(0.01, 50),
)
def test_a_reward_is_bounded_where_it_says_so_and_has_the_sign_of_the_difference(
    kind: str,
    teacher: float,
    student: float,
    alpha: float,
    tau: float,
    low: float,
    high: float,
) -> None:
    objective = ObjectiveConfig(kind=kind, alpha=alpha, tau=tau, clip_low=low, clip_high=high)
    reward = build_reward(objective)(*pair(teacher, student)).item()
    if kind in BOUNDS:
        smallest, largest = BOUNDS[kind](objective)
        rounding = 1e-6 * max(-smallest, largest)
        assert smallest - rounding <= reward <= largest + rounding
    if teacher == student:
        assert reward == 0
    else:
        assert reward * (1 if teacher > student else -1) >= 0
    exponent = {"prob_diff": 1.0, "sqrt_diff": 0.5}.get(kind, alpha)
    if kind in ("power", "prob_diff", "sqrt_diff", "box_cox"):
        is_told = (
            max(teacher, student) * exponent > -60 and abs(teacher - student) * exponent > 1e-9
        )
    else:
        is_told = abs(teacher - student) > 1e-9
    if is_told:
        assert math.copysign(1, reward) == math.copysign(1, teacher - student)


@pytest.mark.parametrize("kind", ["z_score", "power", "log_ratio", "clip"])
@pytest.mark.parametrize("how", ["z_score", "sign_max_abs"])
def test_a_normalized_reward_is_that_of_the_whole_batch_for_any_part_of_it(
    kind: str, how: str
) -> None:
    own = kind == "z_score"
    if own and how == "sign_max_abs":
        pytest.skip("normalized in itself")
    objective = ObjectiveConfig(kind=kind, reward_normalization="none" if own else how)
    teacher, student = batch()
    reward = fitted(objective, teacher, student)
    of_batch = exact_rewards(objective, teacher.double(), student.double())
    expected = normalized(objective, of_batch, of_batch)
    for part in (slice(None), slice(7, 20), slice(399, 400)):
        found = reward(teacher[part], student[part])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected[part], rtol=1e-5, atol=1e-6)


def test_a_z_score_changes_signs_and_the_largest_of_each_sign_does_not() -> None:
    teacher, student = batch()
    student = student - 1.0
    log_ratio = teacher - student
    z_score = fitted(ObjectiveConfig(kind="z_score"), teacher, student)(teacher, student)
    assert ((z_score < 0) & (log_ratio > 0)).any()
    scaled = fitted(
        ObjectiveConfig(kind="log_ratio", reward_normalization="sign_max_abs"), teacher, student
    )(teacher, student)
    assert torch.equal(scaled.sign(), log_ratio.sign())
    assert scaled.max() == 1
    assert scaled.min() == -1


@pytest.mark.parametrize("how", ["z_score", "sign_max_abs"])
def test_batches_without_spread_or_tokens_are_no_division_by_zero(how: str) -> None:
    objective = ObjectiveConfig(kind="log_ratio", reward_normalization=how)
    same = torch.full((5,), -1.0)
    assert fitted(objective, same, same)(same, same).tolist() == [0.0] * 5
    none = torch.zeros(0)
    assert fitted(objective, none, none)(none, none).shape == (0,)
    one_sign = fitted(objective, same, same - 2)(same, same - 2)
    assert one_sign.tolist() == [0.0 if how == "z_score" else 1.0] * 5


def test_a_reward_that_is_not_finite_has_no_z_score() -> None:
    teacher, student = batch()
    teacher[3] = -math.inf
    with pytest.raises(NonFiniteError, match=r"mean and deviation of the rewards .* impossible"):
        fitted(ObjectiveConfig(kind="z_score"), teacher, student)
    power = ObjectiveConfig(kind="power", reward_normalization="z_score")
    assert fitted(power, teacher, student)(teacher, student).isfinite().all()


def test_only_unlikely_tokens_are_punished_whatever_the_teacher_says() -> None:
    student = torch.tensor([-5.0, math.log(0.1), math.log(0.0999), 0.0, -math.inf, math.nan])
    for teacher in (torch.zeros(6), torch.full((6,), -math.inf)):
        reward = constant_negative_reward(teacher, student, low_probability=0.1)
        assert reward[:5].tolist() == [-1.0, 0.0, -1.0, 0.0, -1.0]
        assert reward[5].isnan()
    assert not constant_negative_reward(
        student, student.requires_grad_(), low_probability=0.1
    ).requires_grad
