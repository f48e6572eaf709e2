"""Whether a response has the right answer: by its text, or by its value in a process of its own."""

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Protocol

from poweropd_megatron.config.schema import DataConfig
from poweropd_megatron.errors import ConfigError

DEADLINE_SECONDS = 5.0
START_DEADLINE_SECONDS = 120.0


class AnswerChecker(Protocol):
    """Decides whether responses are correct."""

    num_failures: int
    """Responses counted as wrong because they, or their answer, could not be judged."""

    def check(self, response: str, answer: str) -> bool:
        """Return whether the response ends in the answer."""

    def close(self) -> None:
        """Give back what the checker holds."""


def build_answer_checker(data: DataConfig) -> AnswerChecker:
    """Return the checker that data.answer_check names; close it after use.

    Raises: ConfigError if data.answer_marker is empty, or math-verify is missing or doesn't start.
    """
    if data.answer_check == "math":
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "data.answer_check = 'math' needs math-verify, which is not installed: "
                "pip install 'poweropd_megatron[math]', or set data.answer_check = 'exact'"
            )
        return MathChecker()
    if not data.answer_marker:
        raise ConfigError(
            "data.answer_marker is empty; give the text that precedes an answer, such as '#'"
        )
    return ExactChecker(data.answer_marker)


class ExactChecker:
    """Compares the text after the last marker with the answer, spaces around them aside."""

    def __init__(self, marker: str) -> None:
        self.marker = marker
        self.num_failures = 0

    def check(self, response: str, answer: str) -> bool:
        """Return whether the text after the last marker is the answer; False without a marker."""
        _, marker, given = response.rpartition(self.marker)
        return bool(marker) and given.strip() == answer.strip()

    def close(self) -> None:
        """Return at once: there is nothing to give back."""


class MathChecker:
    """Compares answers with math-verify in a worker process, which is killed if it takes too long.

    Sympy can compute for ever on what a model writes, where no exception reaches it; killing the
    process always ends that. The next response gets a new worker.
    """

    def __init__(self, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.deadline_seconds = deadline_seconds
        self.num_failures = 0
        self._worker = _start_worker()

    def check(self, response: str, answer: str) -> bool:
        """Return whether the response's last answer is mathematically equal to the given one."""
        if self._worker.poll() is not None:
            self._worker = _start_worker()
        request = json.dumps({"response": response, "answer": answer})
        reply = _exchange(self._worker, request, self.deadline_seconds)
        verdict = json.loads(reply) if reply else None
        if verdict is None:
            self.num_failures += 1
        return verdict is True

    def close(self) -> None:
        """End the worker."""
        _stop(self._worker)


Worker = subprocess.Popen[str]


def _start_worker() -> Worker:
    """Return a worker that is ready for requests.

    It is run by its file name, and -P keeps the file's folder out of its import path.
    """
    file = Path(__file__).with_name("math_worker.py")
    worker = subprocess.Popen(
        [sys.executable, "-P", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    if _exchange(worker, None, START_DEADLINE_SECONDS) != "ready\n":
        raise ConfigError(
            "data.answer_check = 'math': the process that runs math-verify did not start; its own "
            "message is above. Repair it with pip install 'poweropd_megatron[math]', or set "
            "data.answer_check = 'exact'"
        )
    return worker


def _exchange(worker: Worker, request: str | None, deadline_seconds: float) -> str:
    """Return the worker's next line after sending a request; "" if it died or had to be killed.

    The timer covers the writing too: a stopped worker leaves a full pipe.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        worker.kill()

    assert worker.stdin is not None
    assert worker.stdout is not None
    timer = threading.Timer(deadline_seconds, expire)
    timer.start()
    try:
        if request is not None:
            worker.stdin.write(request + "\n")
            worker.stdin.flush()
        reply = worker.stdout.readline()
    except BrokenPipeError:
        reply = ""
    finally:
        timer.cancel()
        timer.join()
    if expired.is_set() or not reply.endswith("\n"):
        _stop(worker)
        return ""
    return reply


def _stop(worker: Worker) -> None:
    """Kill the worker, wait until it is gone and close its pipes."""
    worker.kill()
    worker.communicate()
