"""Settings of the objective: each kind's own, layers of files, mini-batches, resuming."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
from test_config_rules import config_with, message_of

from poweropd_megatron.config.load import parse_train_config, to_toml
from poweropd_megatron.config.objective import KINDS, ObjectiveConfig, ObjectiveKind
from poweropd_megatron.config.rules import check, frozen_differences
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.errors import ConfigError

BASE = """\
output_dir = "runs/x"
train_steps = 10
global_batch_size = 12
[student]
path = "s"
[teacher]
path = "t"
[data]
train_files = ["a.jsonl"]
"""
POWER = 'kind = "power"\nalpha = 1.0\n'


def parse(tmp_path: Path, *layers: str, arguments: tuple[str, ...] = ()) -> TrainConfig:
    """Return the settings of files, each with a table of the objective on top of BASE."""
    options = []
    for number, text in enumerate(layers):
        path = tmp_path / f"{number}.toml"
        path.write_text((BASE if number == 0 else "") + f"[objective]\n{text}")
        options += ["--config", str(path)]
    return parse_train_config([*options, *arguments])


def refusal(tmp_path: Path, *layers: str, arguments: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, *layers, arguments=arguments)
    return str(caught.value)


def test_the_table_of_kinds_has_every_kind_and_only_settings_that_exist() -> None:
    assert tuple(KINDS) == get_args(ObjectiveKind)
    known = {field.name for field in dataclasses.fields(ObjectiveConfig)}
    assert {name for kind in KINDS.values() for name in kind.settings} <= known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'kind = "log_ratio"\nalpha = 2.0',
            "objective.alpha = 2.0 would have no effect: objective.kind = 'log_ratio' has none: "
            "power, box_cox and power_exact do. Leave it out",
        ),
        ('kind = "log_ratio"\nalpha = 5.0', "objective.alpha = 5.0 would have no effect"),
        ('kind = "power"\ntau = 1.0', "objective.tau = 1.0 would have no effect"),
        ('kind = "tanh"\nclip_low = -2.0', "objective.kind = 'tanh' has none: clip does"),
        ('kind = "prob_diff"\nalpha = 2.0', "objective.alpha = 2.0 would have no effect"),
        ("low_probability = 0.2", "objective.kind = 'power' has none: constant_negative does"),
        ("ratio_high = 3.0", "objective.importance_ratio = 'none' has no bounds. Leave it out"),
        ("ratio_low = 0.5", "objective.importance_ratio = 'none' has no bounds. Leave it out"),
        (
            'kind = "z_score"\nreward_normalization = "sign_max_abs"',
            "objective.kind = 'z_score' is normalized in itself. Leave it out",
        ),
        (
            'kind = "constant_negative"\nreward_normalization = "sign_max_abs"',
            "objective.kind = 'constant_negative' has rewards of -1 and 0 alone. Leave it out",
        ),
    ],
)
def test_a_setting_without_effect_is_refused_also_at_its_default(
    tmp_path: Path, text: str, message: str
) -> None:
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("terminal", "cross_eos", "takes nothing from the teacher: use 'raw', which comes to the"),
        ("reward_normalization", "z_score", "would reward the tokens that objective.kind ="),
        ("reward_normalization", "sign_max_abs", "would have no effect: objective.kind ="),
    ],
)
def test_what_means_nothing_to_a_reward_without_a_teacher_is_refused(
    setting: str, value: str, message: str
) -> None:
    given = {f"objective__{setting}": value}
    refused = message_of(config_with(objective__kind="constant_negative", **given))
    assert refused.startswith(f"objective.{setting} = '{value}' ")
    assert message in refused
    for terminal in ("raw", "mask", "im_end"):
        check(config_with(objective__kind="constant_negative", objective__terminal=terminal))


def test_settings_that_were_made_in_python_are_checked_too() -> None:
    message = message_of(config_with(objective__kind="log_ratio", objective__alpha=2.0))
    assert message.startswith("objective.alpha = 2.0 would have no effect")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--objective.kind=nothing", "objective.kind must be one of 'power', 'log_ratio'"),
        ("--objective.terminal=eos", "objective.terminal must be one of 'raw', 'mask'"),
        ("--objective.loss_normalization=mean", "must be one of 'token_mean', 'sequence_mean'"),
        ("--objective.window_first_percent=0", "greater than 0 and at most 100, not 0.0"),
        ("--objective.window_after_tokens=-1", "must be at least 0, not -1"),
    ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path: Path, option: str, message: str) -> None:
    assert message in refusal(tmp_path, POWER, arguments=(option,))


def test_one_flag_changes_a_recipes_kind_and_drops_what_was_the_other_kinds(
    tmp_path: Path,
) -> None:
    config = parse(tmp_path, POWER + 'terminal = "raw"', arguments=("--objective.kind=log_ratio",))
    assert config.objective == ObjectiveConfig(kind="log_ratio", terminal="raw")
    kept = parse(tmp_path, POWER, arguments=("--objective.kind=box_cox",))
    assert kept.objective == ObjectiveConfig(kind="box_cox", alpha=1.0)
    clip = parse(tmp_path, POWER, 'kind = "clip"\nclip_low = -2.0')
    assert clip.objective == ObjectiveConfig(kind="clip", clip_low=-2.0)
    off = parse(
        tmp_path,
        'importance_ratio = "token"\nratio_high = 3.0',
        arguments=("--objective.importance_ratio=none",),
    )
    assert off.objective == ObjectiveConfig()


def test_what_comes_with_or_after_the_kind_is_not_dropped_but_refused(tmp_path: Path) -> None:
    both = ("--objective.kind=log_ratio", "--objective.alpha=1.0")
    assert "objective.alpha = 1.0 would have no effect" in refusal(tmp_path, POWER, arguments=both)
    after = ("--objective.alpha=1.0",)
    assert "would have no effect" in refusal(tmp_path, 'kind = "log_ratio"', arguments=after)
    assert "would have no effect" in refusal(tmp_path, 'kind = "log_ratio"', "alpha = 1.0")


@pytest.mark.parametrize("kind", KINDS)
def test_printed_settings_of_each_kind_are_read_as_the_same(tmp_path: Path, kind: str) -> None:
    config = parse(tmp_path, f'kind = "{kind}"')
    path = tmp_path / "again.toml"
    path.write_text(to_toml(config))
    assert parse_train_config(["--config", str(path)]) == config


def test_a_window_that_no_response_reaches_is_refused() -> None:
    of_ten = {"rollout__max_new_tokens": 10, "objective__window_first_percent": 25.0}
    message = message_of(config_with(**of_ten, objective__window_after_tokens=3))
    assert message == (
        "objective.window_after_tokens = 3 leaves no token in the loss: with window_first_percent "
        "= 25 at most the first 3 of rollout.max_new_tokens = 10 count; use at most 2"
    )
    check(config_with(**of_ten, objective__window_after_tokens=2))
    assert "use at most 9" in message_of(
        config_with(rollout__max_new_tokens=10, objective__window_after_tokens=10)
    )


def test_a_mini_batch_divides_the_batch_and_fits_the_ranks() -> None:
    message = message_of(config_with(mini_batch_size=5))
    assert message == (
        "mini_batch_size = 5 must divide global_batch_size = 12; 1, 2, 3, 4, 6 or 12 would work"
    )
    message = message_of(config_with(mini_batch_size=3, micro_batch_size=2), 2)
    assert message.startswith("mini_batch_size = 3 must be a multiple of micro_batch_size = 2 ")
    assert message.endswith("set mini_batch_size to 4 or 12")
    check(config_with(mini_batch_size=4, micro_batch_size=2), 2)
    packed = config_with(mini_batch_size=1, max_tokens_per_microbatch=100)
    assert message_of(packed, 2).startswith("mini_batch_size = 1 must be at least the student's")


def changed(**changes: object) -> dict[str, object]:
    return dataclasses.asdict(config_with(**changes))


def test_settings_without_effect_are_no_difference_between_runs() -> None:
    before = changed(objective__kind="log_ratio", objective__alpha=1.0)
    assert frozen_differences(before, changed(objective__kind="log_ratio")) == []
    assert frozen_differences(before, changed()) == ["objective.kind: was 'log_ratio', is 'power'"]


def test_micro_batches_are_a_part_of_training_only_where_the_loss_is_their_mean() -> None:
    new = {"micro_batch_size": 2, "student__parallel__tensor_model_parallel_size": 2}
    assert frozen_differences(changed(), changed(**new)) == []
    mean = {"objective__loss_normalization": "micro_batch_mean"}
    assert frozen_differences(changed(**mean), changed(**mean, **new)) == [
        "micro_batch_size: was 1, is 2",
        "student.parallel.tensor_model_parallel_size: was 1, is 2",
    ]
