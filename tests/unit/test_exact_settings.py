"""The settings of objectives over the whole vocabulary: what is refused, and how."""

import pytest
from support.run_settings import small_run

from poweropd_megatron.config.objective import KINDS, ObjectiveConfig
from poweropd_megatron.config.objective_rules import check_objective
from poweropd_megatron.config.ranges import check_ranges
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.objectives.exact import build_vocabulary_objective, reward_to_show
from poweropd_megatron.ops.vocabulary_objectives import PowerExact, TopKForwardKL

EXACT = [kind for kind, known in KINDS.items() if known.family == "exact"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_exact_kind_and_no_other_has_an_objective(kind):
    objective = build_vocabulary_objective(ObjectiveConfig(kind=kind))
    assert (objective is not None) == (kind in EXACT)


def test_settings_reach_the_objective():
    objective = build_vocabulary_objective(ObjectiveConfig(kind="power_exact", alpha=0.3))
    assert objective == PowerExact(0.3)
    objective = build_vocabulary_objective(ObjectiveConfig(kind="topk_forward_kl", top_k=7))
    assert objective == TopKForwardKL(7)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("reward_normalization", "z_score"),
        ("importance_ratio", "token"),
        ("head", "recompute"),
        ("tau", 2.0),
    ],
)
def test_settings_of_drawn_tokens_are_refused(kind, setting, value):
    with pytest.raises(ConfigError, match=f"objective.{setting} = .* would have no effect"):
        check_objective(ObjectiveConfig(kind=kind, **{setting: value}))


@pytest.mark.parametrize("terminal", ["cross_eos", "im_end"])
def test_policies_that_score_another_token_are_refused(terminal):
    message = f"objective.terminal = '{terminal}' scores another token .* use 'mask' or 'raw'"
    with pytest.raises(ConfigError, match=message):
        check_objective(ObjectiveConfig(kind="reverse_kl", terminal=terminal))
    check_objective(ObjectiveConfig(kind="reverse_kl", terminal="raw"))


def test_k_is_of_the_top_k_kinds_and_at_least_1(tmp_path):
    with pytest.raises(ConfigError, match=r"top_k = 3 would have no effect: .* topk_forward_kl do"):
        check_objective(ObjectiveConfig(kind="reverse_kl", top_k=3))
    config = small_run(tmp_path)
    config.objective.top_k = 0
    with pytest.raises(ConfigError, match=r"objective.top_k must be at least 1, not 0"):
        check_ranges(config)


def test_alpha_of_the_exact_power_has_to_be_above_0():
    with pytest.raises(ConfigError, match=r"objective.alpha must be > 0"):
        check_objective(ObjectiveConfig(kind="power_exact", alpha=0.0))


def test_what_is_shown_as_reward_is_the_sampled_one():
    import torch

    teacher, student = torch.tensor([-1.0]), torch.tensor([-2.0])
    power = reward_to_show(ObjectiveConfig(kind="power_exact", alpha=1.0))(teacher, student)
    torch.testing.assert_close(power, teacher.exp() - student.exp())
    shown = reward_to_show(ObjectiveConfig(kind="forward_kl"))(teacher, student)
    torch.testing.assert_close(shown, torch.tensor([1.0]))
