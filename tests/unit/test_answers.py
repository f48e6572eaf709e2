"""Answers compared as text, and by math-verify in a worker that may hang or die."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from poweropd_megatron.config.schema import DataConfig
from poweropd_megatron.data.answers import (
    ExactChecker,
    MathChecker,
    Verdict,
    build_answer_checker,
)
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
    assert ExactChecker("#").check(response, answer).correct is expected


def test_build_takes_the_marker_of_the_settings() -> None:
    checker = build_answer_checker(DataConfig(train_files=[], answer_marker="Answer:"))
    assert checker.check("1 # 2 Answer: 3", "3") == Verdict(correct=True, extracted="3")
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
    verdict = math_checker.check(response, answer)
    assert (verdict.correct, verdict.failure) == (expected, None)


def test_math_counts_an_answer_that_it_cannot_read(math_checker: MathChecker) -> None:
    verdict = math_checker.check(r"\boxed{3}", "")
    assert verdict == Verdict(correct=False, failure="unreadable answer")


def test_build_gives_the_math_checker() -> None:
    pytest.importorskip("math_verify")
    checker = build_answer_checker(DataConfig(train_files=[], answer_check="math"))
    assert isinstance(checker, MathChecker)
    checker.close()


def test_endless_computation_is_cut_at_the_deadline() -> None:
    pytest.importorskip("math_verify")
    checker = MathChecker(cpu_seconds=1.0, deadline_seconds=60.0)
    start = time.monotonic()
    verdict = checker.check(r"\boxed{9^{9^{9^{9^9}}}}", "5")
    assert verdict == Verdict(correct=False, failure="deadline")
    assert time.monotonic() - start < 30
    checker.cpu_seconds = 30.0
    assert checker.check(r"\boxed{5}", "5") == Verdict(correct=True, extracted="5")
    checker.close()


def test_a_stalled_machine_makes_no_answer_wrong() -> None:
    pytest.importorskip("math_verify")
    checker = MathChecker(cpu_seconds=5.0, deadline_seconds=60.0)
    pid = checker._worker.pid
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(6.0, os.kill, (pid, signal.SIGCONT)).start()
    assert checker.check(r"\boxed{5}", "5").correct
    assert checker._worker.pid == pid
    checker.close()


@pytest.mark.parametrize("length", [10, 1_000_000])
def test_stopped_worker_is_replaced(length: int) -> None:
    """The long response fills the pipe, so that the checker hangs on writing."""
    pytest.importorskip("math_verify")
    checker = MathChecker(deadline_seconds=1.0)
    stopped = checker._worker.pid
    os.kill(stopped, signal.SIGSTOP)
    verdict = checker.check("x" * length + r"\boxed{5}", "5")
    assert verdict == Verdict(correct=False, failure="deadline")
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)
    checker.deadline_seconds = 30.0
    assert checker.check(r"\boxed{5}", "5").correct
    checker.close()


def test_dead_worker_is_replaced_before_the_next_answer() -> None:
    pytest.importorskip("math_verify")
    checker = MathChecker()
    checker._worker.kill()
    checker._worker.wait()
    assert checker.check(r"\boxed{5}", "5").correct
    checker.close()


def test_close_ends_the_worker_and_may_be_repeated() -> None:
    pytest.importorskip("math_verify")
    checker = MathChecker()
    pid = checker._worker.pid
    checker.close()
    checker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("response", "answer", "tolerance", "expected"),
    [
        (r"\boxed{4.95}", "4.9", 0.1, True),
        (r"\boxed{5}", "4.9", 0.1, True),
        (r"\boxed{5.01}", "4.9", 0.1, False),
        (r"\boxed{4.95}", "4.9", None, False),
        (r"\boxed{3.05, 1}", "1.0, 3", 0.1, True),
        (r"\boxed{3.05}", "1.0, 3", 0.1, False),
        (r"\boxed{x}", "4.9", 0.1, False),
        ("I do not know", "4.9", 0.1, False),
        (r"\boxed{-3, 3}", "3, -3", None, True),
        (r"\boxed{3}", "3, -3", None, False),
    ],
)
def test_math_allows_a_tolerance_and_compares_several_answers_as_a_set(
    math_checker: MathChecker, response: str, answer: str, tolerance: float | None, expected: bool
) -> None:
    verdict = math_checker.check(response, answer, tolerance)
    assert (verdict.correct, verdict.failure) == (expected, None)


def test_a_worker_that_dies_over_a_response_is_told_from_one_that_is_slow() -> None:
    pytest.importorskip("math_verify")
    checker = MathChecker(deadline_seconds=30.0)
    os.kill(checker._worker.pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, (checker._worker.pid, signal.SIGKILL))
    killer.start()
    verdict = checker.check(r"\boxed{5}", "5")
    killer.join()
    checker.close()
    assert verdict == Verdict(correct=False, failure="crash")


def test_a_response_that_needs_too_much_memory_is_not_judged() -> None:
    pytest.importorskip("math_verify")
    checker = MathChecker(cpu_seconds=60.0, deadline_seconds=60.0, memory_bytes=200 * 2**20)
    verdict = checker.check("x " * 40_000_000 + r"\boxed{5}", "5")
    assert verdict.failure in ("memory", "crash")
    assert not verdict.correct
    assert checker.check(r"\boxed{5}", "5").correct
    checker.close()


TALKATIVE_LIBRARY = """
import os

print("loaded")
os.write(1, b"loaded, says C\\n")

def parse(text, parsing_timeout):
    print("a line", flush=True)
    os.system("echo a line of a child")
    return [text]

def verify(gold, target, timeout_seconds):
    print("no end of line", end="", flush=True)
    return True
"""


def test_what_libraries_print_is_no_reply(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text(TALKATIVE_LIBRARY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checker = MathChecker()
    for response in ("5", "6"):
        assert checker.check(response, "5") == Verdict(correct=True, extracted=response)
    checker.close()


@pytest.mark.parametrize("reply", ["a warning", "[1]", "7", "{}", '{"correct": true, "x": 1}'])
def test_a_reply_that_is_no_verdict_is_a_crash_and_the_worker_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reply: str
) -> None:
    worker = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(worker))
    script = "#!/bin/sh\necho ready\nread request\necho '{}'\nread more\n"
    worker.write_text(script.format(reply))
    worker.chmod(0o755)
    checker = MathChecker()
    first = checker._worker
    assert checker.check("5", "5") == Verdict(correct=False, failure="crash")
    assert first.poll() is not None
    worker.write_text(script.format('{"correct": true}'))
    assert checker.check("5", "5") == Verdict(correct=True)
    checker.close()
