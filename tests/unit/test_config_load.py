"""Settings from files and command lines: exact types, exact messages, and back to TOML."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from poweropd_megatron.config.load import parse_train_config, to_toml
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.config.settings import SETTINGS, TABLES
from poweropd_megatron.errors import ConfigError

REQUIRED = {
    "output_dir": "runs/x",
    "train_steps": 5,
    "global_batch_size": 4,
    "student": {"path": "student"},
    "teacher": {"path": "teacher"},
    "data": {"train_files": ["a.jsonl"]},
}


def write_toml(folder: Path, changes: dict[str, object], name: str = "run.toml") -> str:
    """Return the path of a file with the required settings and changes under dotted names."""
    document = tomllib.loads(tomli_w.dumps(REQUIRED))
    for dotted, value in changes.items():
        *tables, key = dotted.split(".")
        table = document
        for table_name in tables:
            table = table.setdefault(table_name, {})
        table[key] = value
    path = folder / name
    path.write_text(tomli_w.dumps(document), encoding="utf-8")
    return str(path)


def parse(folder: Path, changes: dict[str, object], *overrides: str) -> TrainConfig:
    return parse_train_config(["--config", write_toml(folder, changes), *overrides])


def message_of(folder: Path, changes: dict[str, object], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(folder, changes, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "Parser key" not in message
    return message


def test_a_file_with_the_required_settings_gives_the_schemas_defaults(tmp_path):
    config = parse(tmp_path, {})
    required = {name for name, setting in SETTINGS.items() if setting.required}
    assert required == {
        "output_dir",
        "train_steps",
        "global_batch_size",
        "student.path",
        "teacher.path",
        "data.train_files",
    }
    assert config.optimizer.lr == 5e-7
    assert config.optimizer.lr_decay_iters is None
    assert config.data.train_files == ["a.jsonl"]


@pytest.mark.parametrize("override", [["--optimizer.lr", "1e-3"], ["--optimizer.lr=1e-3"]])
def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path, override):
    path = write_toml(tmp_path, {"optimizer.lr": 0.5})
    assert parse_train_config(["--config", path, *override]).optimizer.lr == 1e-3
    assert parse_train_config([*override, "--config", path]).optimizer.lr == 1e-3


def test_a_later_file_wins_setting_by_setting(tmp_path):
    first = write_toml(tmp_path, {"optimizer.lr": 0.5, "optimizer.weight_decay": 0.1})
    second = tmp_path / "second.toml"
    second.write_text("optimizer.lr = 0.25")
    config = parse_train_config(["--config", first, "--config", str(second)])
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.25, 0.1)


def test_every_setting_can_be_given_on_the_command_line_alone():
    config = parse_train_config(
        [
            *("--output_dir=o", "--train_steps=2", "--global_batch_size", "2"),
            *("--student.path", "5", "--student.dtype", "fp32", "--teacher.path", "t"),
            *("--data.train_files", '["a", "5"]', "--data.shuffle", "false"),
            *("--data.apply_chat_template", "true", "--data.prompt_suffix="),
            "--data.chat_template_kwargs={enable_thinking = false, level = '5'}",
            *("--optimizer.lr_decay_iters", "2", "--eval.max_prompts", "null"),
        ]
    )
    assert config.student.path == "5"
    assert config.student.dtype == "fp32"
    assert config.data.train_files == ["a", "5"]
    assert config.data.shuffle is False
    assert config.data.chat_template_kwargs == {"enable_thinking": False, "level": "5"}
    assert config.optimizer.lr_decay_iters == 2
    assert config.eval.max_prompts is None


def test_a_list_of_the_file_is_replaced_or_added_to(tmp_path):
    assert parse(tmp_path, {}, '--data.train_files=["b"]').data.train_files == ["b"]
    assert parse(tmp_path, {}, "--data.train_files+=b").data.train_files == ["a.jsonl", "b"]


def test_a_file_value_is_never_converted_except_int_to_float(tmp_path):
    kwargs = {"text": "5", "flag": True, "nested": {"text": "null", "one": 1}}
    changes = {
        "data.chat_template_kwargs": kwargs,
        "data.apply_chat_template": True,
        "data.prompt_suffix": "true",
        "data.train_files": ["5", "null"],
        "optimizer.lr": 1,
    }
    config = parse(tmp_path, changes, "--seed", "7")
    assert config.data.chat_template_kwargs == kwargs
    assert config.data.prompt_suffix == "true"
    assert config.data.train_files == ["5", "null"]
    assert type(config.optimizer.lr) is float


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "5", "seed must be an integer, not '5'"),
        ("seed", True, "seed must be an integer, not True"),
        ("seed", 5.0, "seed must be an integer, not 5.0"),
        ("output_dir", 5, "output_dir must be a string, not 5"),
        ("optimizer.lr", "1e-3", "optimizer.lr must be a finite number, not '1e-3'"),
        ("optimizer.lr", True, "optimizer.lr must be a finite number, not True"),
        ("optimizer.lr", float("inf"), "optimizer.lr must be a finite number, not inf"),
        ("optimizer.lr", {"x": 1}, "optimizer.lr must be a finite number, not {'x': 1}"),
        ("optimizer.lr_decay_iters", "4", "an integer or null (in a file: left out), not '4'"),
        ("data.shuffle", 1, "data.shuffle must be true or false, not 1"),
        ("data.shuffle", "true", "data.shuffle must be true or false, not 'true'"),
        ("data.train_files", "a", 'data.train_files must be a list of strings such as ["a", "b"]'),
        ("data.train_files", ["a", 1], "not ['a', 1]"),
        ("data.chat_template_kwargs", "a", "data.chat_template_kwargs must be a table"),
        (
            "objective.head",
            "wide",
            "objective.head must be one of 'fused', 'recompute', 'materialized', not 'wide'",
        ),
        ("optimizer", 3, "optimizer is a table of settings: give them one by one"),
    ],
)
def test_a_value_of_another_type_in_a_file_is_refused(tmp_path, name, value, message):
    given = message_of(tmp_path, {name: value})
    assert message in given
    assert "run.toml" in given


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train_steps=4.5", "train_steps must be an integer, not '4.5'"),
        ("--train_steps=1e3", "train_steps must be an integer, not '1e3'"),
        ("--train_steps=true", "train_steps must be an integer, not 'true'"),
        ("--train_steps=null", "train_steps must be an integer, not 'null'"),
        ("--optimizer.lr=fast", "optimizer.lr must be a finite number, not 'fast'"),
        ("--optimizer.lr=nan", "optimizer.lr must be a finite number, not 'nan'"),
        ("--optimizer.lr=1e400", "optimizer.lr must be greater than 0 and finite, not inf"),
        ("--optimizer.lr_decay_iters=none", "an integer or null"),
        ("--data.shuffle=maybe", "data.shuffle must be true or false, not 'maybe'"),
        ("--data.train_files=a", 'must be a list of strings such as ["a", "b"], not \'a\''),
        ("--data.chat_template_kwargs=5", "must be a table such as {name = true}, not '5'"),
        ("--student.dtype=fp16", "student.dtype must be one of 'fp32', 'bf16', not 'fp16'"),
        ("--optimizer=x", "optimizer is a table of settings: give them one by one, such as"),
        ("--optimizer.lr", "--optimizer.lr needs a value: a finite number"),
        ("stray", "stray: not understood"),
        ("-x", "-x: not understood"),
        ("--config", "--config: expected one argument"),
    ],
)
def test_a_wrong_text_on_the_command_line_is_refused(tmp_path, override, message):
    assert message in message_of(tmp_path, {}, override)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("optimizer.lrr", "optimizer.lr"),
        ("optimiser.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("train_step", "train_steps"),
        ("student.tensor_model_parallel_size", "student.parallel.tensor_model_parallel_size"),
        ("max_new_tokens", "rollout.max_new_tokens or eval.max_new_tokens"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, name, nearest):
    expected = f"{name} is not a setting; did you mean {nearest}?"
    assert message_of(tmp_path, {}, f"--{name}", "3") == expected
    assert message_of(tmp_path, {}, f"--{name}=3") == expected
    assert message_of(tmp_path, {name: 3}).endswith(expected)


@pytest.mark.parametrize("name", ["zzzzzz", "qqq.vvvvv"])
def test_a_name_near_to_none_points_to_the_help(tmp_path, name):
    assert message_of(tmp_path, {name: {}}).endswith(
        f"{name} is not a setting; see poweropd train --help"
    )


def test_an_abbreviated_option_is_refused(tmp_path):
    assert "global_batch is not a setting" in message_of(tmp_path, {}, "--global_batch=4")


def test_every_missing_required_setting_is_named():
    with pytest.raises(ConfigError) as caught:
        parse_train_config(["--output_dir", "x", "--teacher.path", "t"])
    missing = "train_steps, global_batch_size, student.path, data.train_files"
    assert str(caught.value).startswith(f"no value for {missing}: ")


def test_a_combination_that_cannot_work_is_refused(tmp_path):
    assert "objective.alpha must be > 0" in message_of(tmp_path, {}, "--objective.alpha=0")


def test_an_unreadable_file_is_named(tmp_path):
    broken = tmp_path / "broken.toml"
    for content, message in (
        (b"seed = 1\ntrain_steps = = 2\n", "not valid TOML: Invalid value (at line 2, column 15)"),
        (b"seed = 1\nseed = 2\n", "not valid TOML"),
        (b'output_dir = "\xff"\n', "can't be read"),
    ):
        broken.write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken\.toml") as caught:
            parse_train_config(["--config", str(broken)])
        assert message in str(caught.value)
    for path, message in ((tmp_path / "none.toml", "no such file"), (tmp_path, "can't be read")):
        with pytest.raises(ConfigError, match=message):
            parse_train_config(["--config", str(path)])


@settings(deadline=None, max_examples=25)
@given(
    text=st.text(),
    number=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    flag=st.booleans(),
    limit=st.none() | st.integers(1, 10**12),
    kwargs=st.dictionaries(st.text(), st.text() | st.booleans() | st.integers(-9, 9)),
)
def test_toml_round_trips(tmp_path_factory, text, number, flag, limit, kwargs):
    folder = tmp_path_factory.mktemp("round_trip")
    config = parse(folder, {})
    config.data.prompt_suffix = text
    config.data.train_files = ["x", text]
    config.data.apply_chat_template = True
    config.data.chat_template_kwargs = config.student.megatron = kwargs
    config.data.shuffle = flag
    config.optimizer.lr = number
    config.eval.max_prompts = limit
    path = folder / "again.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert parse_train_config(["--config", str(path)]) == config


def test_print_config_writes_what_config_reads(tmp_path, capsys):
    path = write_toml(tmp_path, {"eval.max_prompts": 3})
    arguments = ["--config", path, "--optimizer.lr", "2e-3"]
    with pytest.raises(SystemExit) as caught:
        parse_train_config([*arguments, "--print_config"])
    assert caught.value.code == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    expected = parse_train_config(arguments)
    assert parse_train_config(["--config", str(printed)]) == expected
    assert set(tomllib.loads(printed.read_text())) == {
        field.name
        for field in dataclasses.fields(TrainConfig)
        if getattr(expected, field.name) is not None
    }


def test_help_describes_every_setting_under_its_table(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train_config(["--config", "none.toml", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for table in TABLES:
        assert f"\n{table or 'run'}:\n" in text
    words = " ".join(text.split())
    for name, setting in SETTINGS.items():
        assert f"\n  --{name} " in text or f"\n  --{name}," in text
        assert setting.help.split()[0] in words
        assert len(setting.help) > 10
    assert "(type: float, default: 5e-07)" in words
    assert "(type: table, default: {})" in words
    assert "(required, type: int)" in words
