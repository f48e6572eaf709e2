"""Importance ratios: the estimate that they mend, their bounds, their metrics."""

import math

import pytest
import torch
from support import made_trajectories

from poweropd_megatron.config.objective import ObjectiveConfig
from poweropd_megatron.objectives.importance import (
    ImportanceRatio,
    build_importance_ratio,
    importance_metrics,
    log_ratios,
)
from poweropd_megatron.objectives.labels import label
from poweropd_megatron.objectives.sampled.power import power_reward
from poweropd_megatron.objectives.weights import weigh_tokens
from poweropd_megatron.train.step_metrics import step_metrics
from poweropd_megatron.train.student_outcome import StudentOutcome

WIDE = {"low": 0.0, "high": 1e9}
EOS, TEACHER_EOS = 1, 2


def ratio(level: str, **bounds: float) -> ImportanceRatio:
    return ImportanceRatio(level=level, **(WIDE | bounds))


def test_without_the_setting_there_is_no_ratio() -> None:
    assert build_importance_ratio(ObjectiveConfig()) is None
    asked = ObjectiveConfig(importance_ratio="token", ratio_low=0.5, ratio_high=3.0)
    assert build_importance_ratio(asked) == ImportanceRatio(level="token", low=0.5, high=3.0)


def test_weighed_draws_of_another_temperature_have_the_expected_gradient_of_the_students() -> None:
    """Over all tokens of a vocabulary of 7, each as often as the behaviour draws it."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 1.5 * torch.randn(2, 7, generator=generator, dtype=torch.float64)
    q, p, b = (x.log_softmax(0).float() for x in (student, teacher, student / 0.6))
    reward = power_reward(p, q, alpha=2.0).double()
    to_logits = torch.eye(7, dtype=torch.float64) - q.double().exp()
    on_policy = (q.double().exp() * reward) @ to_logits
    weights = ratio("token").truncated(log_ratios(q, b, torch.ones(7, dtype=torch.bool)))
    weighed = (b.double().exp() * weights.double() * reward) @ to_logits
    torch.testing.assert_close(weighed, on_policy, rtol=0, atol=1e-7)
    unweighed = (b.double().exp() * reward) @ to_logits
    assert (unweighed - on_policy).norm() > 0.05 * on_policy.norm()


@pytest.mark.parametrize("terminal", ["raw", "mask", "im_end"])
def test_ratios_are_of_drawn_tokens_in_the_loss_and_hold_to_both_bounds(terminal: str) -> None:
    rows = made_trajectories.make([([5], [7, 8, EOS]), ([5, 6], [9, 9]), ([4], [EOS])], eos=EOS)
    labels = label(rows, terminal, teacher_eos_id=TEACHER_EOS)
    student_BT = torch.tensor([[0, -1, -1, -9], [0, 0, -2, -3], [0, -4, 0, 0]]).float()
    rows.behaviour_logp_BT.copy_(torch.tensor([[0, -2, 0, -9.5], [0, 0, -2, -2.5], [0, -3, 0, 0]]))
    ends = 1.0 if terminal == "im_end" else math.exp(0.5)
    token = [[math.e, math.exp(-1), ends], [1.0, math.exp(-0.5)], [math.exp(-1)]]
    if terminal == "im_end":
        token[2] = [1.0]
    calls = []

    def score(*batch: object) -> torch.Tensor:
        calls.append(batch)
        return student_BT

    def weigh(level: str, **bounds: float) -> torch.Tensor:
        weights = weigh_tokens(
            rows,
            labels,
            normalization="token_mean",
            micro_batches=[],
            ratio=ratio(level, **bounds),
            score=score,
        )
        assert weights is not None
        weight_BT = weights(slice(None), student_BT.clone().requires_grad_())
        assert not weight_BT.requires_grad
        return weight_BT

    expected_BT = torch.ones(3, 4)
    for row, (start, values) in enumerate(zip((1, 2, 1), token, strict=True)):
        expected_BT[row, start : start + len(values)] = torch.tensor(values)
    mask_BT = labels.mask_BT
    torch.testing.assert_close(weigh("token")[mask_BT], expected_BT[mask_BT])
    bounded = weigh("token", low=0.6, high=2.0)[mask_BT]
    torch.testing.assert_close(bounded, expected_BT[mask_BT].clamp(0.6, 2.0))
    assert not calls, "a pass before the update although each token has its own ratio"
    products_B = torch.where(mask_BT, expected_BT, 1.0).prod(dim=1)
    whole = weigh("sequence")
    torch.testing.assert_close(whole[mask_BT], products_B[:, None].expand(3, 4)[mask_BT])
    held = weigh("sequence", low=0.7, high=1.2)
    torch.testing.assert_close(
        held[mask_BT], products_B.clamp(0.7, 1.2)[:, None].expand(3, 4)[mask_BT]
    )
    assert len(calls) == 2


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_metrics_are_of_the_ratios_before_truncation(level: str) -> None:
    log_ratio_BT = torch.tensor([[0.0, 1.0, -1.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    is_drawn_BT = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    metrics = importance_metrics(log_ratio_BT, is_drawn_BT, ratio(level, low=0.5, high=2.0))
    ratios = [math.e, 1 / math.e, math.e**2] if level == "token" else [1.0, math.e**2]
    clipped = 1.0 if level == "token" else 0.5
    size = sum(ratios) ** 2 / (len(ratios) * sum(value**2 for value in ratios))
    assert metrics == pytest.approx(
        {
            "importance/mean": sum(ratios) / len(ratios),
            "importance/min": min(ratios),
            "importance/max": max(ratios),
            "importance/effective_sample_size": size,
            "importance/clipped_fraction": clipped,
        }
    )


def test_equal_ratios_are_all_of_the_samples_and_huge_ones_are_no_overflow() -> None:
    drawn = torch.ones(2, 3, dtype=torch.bool)
    equal = importance_metrics(torch.full((2, 3), 0.25), drawn, ratio("token", high=2.0))
    assert equal["importance/effective_sample_size"] == pytest.approx(1.0)
    assert equal["importance/clipped_fraction"] == 0
    huge = importance_metrics(torch.tensor([[900.0, 0, 0]] * 2), drawn, ratio("token"))
    assert huge["importance/effective_sample_size"] == pytest.approx(1 / 3)
    none = importance_metrics(torch.zeros(2, 3), ~drawn, ratio("sequence"))
    assert set(none.values()) == {0.0}


def test_the_metrics_of_a_step_have_ratios_when_they_are_on_and_the_loss_is_weighed() -> None:
    rows = made_trajectories.make([([5], [7, 8]), ([5], [9, 9])], eos=EOS)
    labels = label(rows, "raw", teacher_eos_id=TEACHER_EOS)
    logp_BT = torch.tensor([[0.0, -1.0, -2.0], [0.0, -3.0, -1.5]])
    rows.behaviour_logp_BT.copy_(torch.tensor([[0.0, -1.5, -2.0], [0.0, -3.0, -1.0]]))
    outcome = StudentOutcome(
        logp_BT=logp_BT,
        teacher_logp_BT=logp_BT,
        entropy_BT=torch.zeros_like(logp_BT),
        grad_norm=1.0,
        learning_rate=1.0,
        reward=lambda teacher, student: teacher - student,
        weight_BT=torch.tensor([[0.0, 2.0, 0.5], [0.0, 1.0, 3.0]]),
    )
    teacher_BT = logp_BT + torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, -1.0]])
    metrics = step_metrics(rows, labels, teacher_BT, outcome, ratio=ratio("token", high=1.2))
    assert metrics["loss"] == pytest.approx((2.0 * 1 + 0.5 * 2 + 1.0 * 3 - 3.0 * 1.5) / 4)
    assert metrics["importance/clipped_fraction"] == 0.25
    assert metrics["rollout/logp_difference"] == pytest.approx(0.25)
    assert metrics["rollout/logp_gap"] == pytest.approx(0.5)
    plain = step_metrics(rows, labels, teacher_BT, outcome, ratio=None)
    assert not any(name.startswith("importance/") for name in plain)
