"""The launch scripts by themselves: valid bash, valid Python, and torchrun's exit codes."""

import ast
import os
import runpy
import signal
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = [*REPO.glob("launch/*.sh"), REPO / "tests" / "run.sh", REPO / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash_and_executable(script):
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=10)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert os.access(script, os.X_OK)


@pytest.mark.filterwarnings("error")
def test_the_training_script_is_valid_python_whose_docstring_is_the_bash_part():
    tree = ast.parse((REPO / "launch" / "pretrain_opd.sh").read_text())
    docstring = ast.get_docstring(tree, clean=False)
    assert docstring is not None
    assert docstring.startswith(":")
    assert "exec" in docstring
    compile(tree, "pretrain_opd.sh", "exec")


@pytest.mark.parametrize(
    ("exit_code", "expected", "words"),
    [(2, 2, ""), (7, 7, "exit code 7"), (-signal.SIGKILL, 137, "SIGKILL")],
)
def test_torchrun_ends_like_the_rank_that_failed_first(
    monkeypatch, capsys, exit_code, expected, words
):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    script = runpy.run_path(str(REPO / "launch" / "torchrun.py"))
    first = ProcessFailure(1, 4321, exit_code, "<N/A>")
    later = ProcessFailure(0, 1234, -signal.SIGTERM, "<N/A>")
    first.timestamp, later.timestamp = 100, 101

    def fail(_):
        raise ChildFailedError("script", {0: later, 1: first})

    monkeypatch.setattr("torch.distributed.run.run", fail)
    assert script["main"](["script"]) == expected
    stderr = capsys.readouterr().err
    assert words in stderr
    assert ("rank 1" in stderr) == bool(words)
