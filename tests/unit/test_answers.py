"""Answers compared as text, and by math-verify in a worker that may hang or die."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from poweropd_megatron.config.schema import DataConfig
from poweropd_megatron.data.answers import ExactChecker, MathChecker, build_answer_checker
from poweropd_megatron.errors import ConfigError


@pytest.fixture(scope="module")
def math_checker() -> Iterator[MathChecker]:
    pytest.importorskip("math_verify")
    checker = MathChecker()
    yield checker
    checker.close()


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("5+9=14#14", "14", True),
        ("5+9=14# 14 \n", "14", True),
        ("#3#14", "14", True),
        ("#14#3", "14", False),
        ("5+9=14", "14", False),
        ("#", "14", False),
        ("#014", "14", False),
        ("#14", " 14 ", True),
        ("", "14", False),
    ],
)
def test_exact_compares_what_follows_the_last_marker(
    response: str, answer: str, expected: bool
) -> None:
    assert ExactChecker("#").check(response, answer) is expected


def test_build_takes_the_marker_of_the_settings() -> None:
    checker = build_answer_checker(DataConfig(train_files=[], answer_marker="Answer:"))
    assert checker.check("1 # 2 Answer: 3", "3")
    assert checker.num_failures == 0
    checker.close()


def test_empty_marker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.answer_marker is empty"):
        build_answer_checker(DataConfig(train_files=[], answer_marker=""))


def test_math_without_math_verify_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"data\.answer_check = 'math'.*poweropd_megatron\[math\]"
    ):
        build_answer_checker(DataConfig(train_files=[], answer_check="math"))


def test_worker_that_does_not_start_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(ConfigError, match="did not start"):
        MathChecker()


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{1/2}", "0.5", True),
        (r"\boxed{0.5}", "1/2", True),
        (r"\boxed{12}, found after 13 tries", "12", True),
        (r"\boxed{13}", "12", False),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", True),
        (r"\boxed{\frac12}", r"$\frac{1}{2}$", True),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"\boxed{(2, 1)}", "(1,2)", False),
        ("I do not know", "12", False),
        ("", "12", False),
        ("line\nbreaks\u2028and \\boxed{7}", "7", True),
    ],
)
def test_math_compares_values(
    math_checker: MathChecker, response: str, answer: str, expected: bool
) -> None:
    before = math_checker.num_failures
    assert math_checker.check(response, answer) is expected
    assert math_checker.num_failures == before


def test_math_counts_an_answer_that_it_cannot_read(math_checker: MathChecker) -> None:
    before = math_checker.num_failures
    assert math_checker.check(r"\boxed{3}", "") is False
    assert math_checker.num_failures == before + 1


def test_build_gives_the_math_checker() -> None:
    pytest.importorskip("math_verify")
    checker = build_answer_checker(DataConfig(train_files=[], answer_check="math"))
    assert isinstance(checker, MathChecker)
    checker.close()


def test_endless_computation_is_cut_at_the_deadline() -> None:
    pytest.importorskip("math_verify")
    checker = MathChecker(deadline_seconds=1.0)
    start = time.monotonic()
    assert checker.check(r"\boxed{9^{9^{9^{9^9}}}}", "5") is False
    assert time.monotonic() - start < 5
    assert checker.num_failures == 1
    checker.deadline_seconds = 30.0
    assert checker.check(r"\boxed{5}", "5") is True
    assert checker.num_failures == 1
    checker.close()


@pytest.mark.parametrize("length", [10, 1_000_000])
def test_stopped_worker_is_replaced(length: int) -> None:
    """The long response fills the pipe, so that the checker hangs on writing."""
    pytest.importorskip("math_verify")
    checker = MathChecker(deadline_seconds=1.0)
    stopped = checker._worker.pid
    os.kill(stopped, signal.SIGSTOP)
    assert checker.check("x" * length + r"\boxed{5}", "5") is False
    assert checker.num_failures == 1
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)
    checker.deadline_seconds = 30.0
    assert checker.check(r"\boxed{5}", "5") is True
    checker.close()


def test_dead_worker_is_replaced_before_the_next_answer() -> None:
    pytest.importorskip("math_verify")
    checker = MathChecker()
    checker._worker.kill()
    checker._worker.wait()
    assert checker.check(r"\boxed{5}", "5") is True
    assert checker.num_failures == 0
    checker.close()


def test_close_ends_the_worker_and_may_be_repeated() -> None:
    pytest.importorskip("math_verify")
    checker = MathChecker()
    pid = checker._worker.pid
    checker.close()
    checker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
