"""The poweropd command: quick, silent about tracebacks, and printed once in a job of many ranks."""

import json
import os
import resource
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from poweropd_megatron import __version__
from poweropd_megatron.cli.main import main
from poweropd_megatron.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "launch/recipes/chain_sum.toml")
ONE_RANK = [
    "--student.parallel.tensor_model_parallel_size=1",
    "--teacher.parallel.tensor_model_parallel_size=1",
]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")

HEAVY_MODULES_AFTER = """
import contextlib, io, json, sys
from poweropd_megatron.cli.main import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    try:
        code = main(sys.argv[1:])
    except SystemExit as ended:
        code = ended.code
heavy = [name for name in ("torch", "megatron", "numpy", "matplotlib") if name in sys.modules]
print(json.dumps([code, heavy]))
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def poweropd(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "poweropd_megatron.cli.main", *arguments, **variables)


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trained(monkeypatch):
    """The configs that run_training is called with."""
    configs = []
    module = types.ModuleType("poweropd_megatron.train.run")
    module.run_training = configs.append
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return configs


def test_train_help_answers_in_half_a_second():
    """Of CPU time, which other work on the machine changes little; it has nothing to wait for."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = poweropd("train", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
    assert result.returncode == 0
    assert "--optimizer.lr" in result.stdout
    assert "poweropd train --config" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--config", RECIPE, "--print_config"], 0),
        (["train", "--config", RECIPE, "--optimizer.lrr", "1"], 2),
        (["train", "--config", RECIPE, "--objective.alpha", "0"], 2),
        (["train", "--config", RECIPE], 2),
        (["eval", "--help"], 0),
        (["eval", "--student.path=m", "--output_dir=o"], 2),
    ],
)
def test_nothing_heavy_is_imported_for_an_answer_about_settings(arguments, code):
    result = run("-c", HEAVY_MODULES_AFTER, *arguments)
    assert json.loads(result.stdout) == [code, []], result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.lrr=1"], "optimizer.lrr is not a setting; did you mean optimizer.lr?"),
        (["--config", "no.toml"], "--config no.toml: no such file"),
        (["--config", RECIPE, "--seed=x"], "seed must be an integer, not 'x'"),
        (["--config", RECIPE], "must divide the number of ranks (1): start 2 ranks"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(arguments, message):
    result = poweropd("train", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("poweropd: error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_error_of_all_ranks_is_printed_by_rank_0_alone(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["train", "--seed", "x"]) == 2
        assert capsys.readouterr().err.count("poweropd: error: ") == expected
    with pytest.raises(SystemExit):
        main(["train", "--config", RECIPE, "--print_config"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("LOCAL_RANK", "x")],
)
def test_a_variable_of_torchrun_that_is_no_number_is_named(name, value, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    assert main(["train", "--config", RECIPE, *ONE_RANK]) == 2
    assert f"error: the environment has {name}={value}: expected a whole" in capsys.readouterr().err


def test_print_config_prints_toml_and_nothing_else():
    result = poweropd("train", "--config", RECIPE, "--train_steps", "7", "--print_config")
    assert (result.returncode, result.stderr) == (0, "")
    assert tomllib.loads(result.stdout)["train_steps"] == 7


def test_train_runs_with_the_settings_that_were_given(trained):
    assert main(["train", "--config", RECIPE, *ONE_RANK, "--train_steps", "7"]) == 0
    assert [config.train_steps for config in trained] == [7]


def test_train_checks_the_layout_against_the_ranks_that_were_started(trained, capsys, monkeypatch):
    assert main(["train", "--config", RECIPE]) == 2
    assert "number of ranks (1)" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--config", RECIPE]) == 0
    assert len(trained) == 1


def test_errors_of_training_are_messages_only_if_the_user_can_mend_them(monkeypatch, capsys):
    module = types.ModuleType("poweropd_megatron.train.run")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def fail(error):
        def run_training(_config):
            raise error

        module.run_training = run_training
        return main(["train", "--config", RECIPE, *ONE_RANK])

    assert fail(InputError("train.jsonl: line 3 has no prompt")) == 2
    assert capsys.readouterr().err == "poweropd: error: train.jsonl: line 3 has no prompt\n"
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_report_prints_the_path_that_was_written(monkeypatch, capsys, tmp_path):
    module = types.ModuleType("poweropd_megatron.telemetry.report")
    module.write_report = lambda run_dir, path: path or run_dir / "report.html"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert main(["report", str(tmp_path), "--output", "elsewhere.html"]) == 0
    assert capsys.readouterr().out == "elsewhere.html\n"


def test_version_and_help(capsys):
    for arguments, text in (
        (["--version"], f"poweropd {__version__}\n"),
        (["--help"], "poweropd report runs/chain_sum"),
        (["report", "--help"], "--output FILE"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["trian"], ["report"], ["report", "a", "--b"]])
def test_a_malformed_command_line_shows_the_usage_and_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: poweropd")
