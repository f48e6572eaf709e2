"""Whether a response has the right answer: by its text, or by its value in a process of its own."""

import importlib.util
import json
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Literal, Protocol

from poweropd_megatron.config.schema import PromptConfig
from poweropd_megatron.errors import ConfigError

CPU_SECONDS = 5.0
DEADLINE_SECONDS = 30.0
START_DEADLINE_SECONDS = 120.0
WORKER_MEMORY_BYTES = 4 * 2**30


Failure = Literal["deadline", "crash", "memory", "unreadable answer"]
"""Why a response could not be judged."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of checking a response."""

    correct: bool
    extracted: str | None = None
    """What was taken for the response's answer, None where none was found."""
    failure: Failure | None = None
    """Set where the response is taken for wrong because it, or its answer, couldn't be judged."""


class AnswerChecker(Protocol):
    """Decides whether responses are correct."""

    def check(self, response: str, answer: str, tolerance: float | None = None) -> Verdict:
        """Return whether the response ends in the answer, or in a number within the tolerance."""

    def close(self) -> None:
        """Give back what the checker holds."""


def build_answer_checker(data: PromptConfig) -> AnswerChecker:
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

    def check(self, response: str, answer: str, tolerance: float | None = None) -> Verdict:
        """Return whether the text after the last marker is the answer; not so without a marker.

        A tolerance needs numbers, which this doesn't read: inputs.read_eval_prompts refuses it.
        """
        del tolerance
        _, marker, given = response.rpartition(self.marker)
        if not marker:
            return Verdict(correct=False)
        return Verdict(correct=given.strip() == answer.strip(), extracted=given.strip())

    def close(self) -> None:
        """Return at once: there is nothing to give back."""


class MathChecker:
    """Compares answers with math-verify in a worker process, which is killed if it takes too long.

    Sympy can compute for ever on what a model writes, where no exception reaches it; killing the
    process always ends that. The next response gets a new worker. A worker has so much memory and
    no more. The limit is on its CPU time, which no other process takes from it; the deadline, some
    times as long, is for one that waits for something.
    """

    def __init__(
        self,
        *,
        cpu_seconds: float = CPU_SECONDS,
        deadline_seconds: float = DEADLINE_SECONDS,
        memory_bytes: int = WORKER_MEMORY_BYTES,
    ) -> None:
        self.cpu_seconds = cpu_seconds
        self.deadline_seconds = deadline_seconds
        self._memory_bytes = memory_bytes
        self._worker = _start_worker(memory_bytes)

    def check(self, response: str, answer: str, tolerance: float | None = None) -> Verdict:
        """Return whether the response's last answer is mathematically equal to the given one."""
        if self._worker.poll() is not None:
            self._worker = _start_worker(self._memory_bytes)
        request = {"response": response, "answer": answer, "tolerance": tolerance}
        line = json.dumps(request | {"cpu_seconds": self.cpu_seconds})
        reply = _exchange(self._worker, line, self.deadline_seconds)
        if reply is _Silence.EXPIRED:
            return Verdict(correct=False, failure="deadline")
        verdict = _read_verdict(reply) if isinstance(reply, str) else None
        if verdict is None:
            _stop(self._worker)
            return Verdict(correct=False, failure="crash")
        return verdict

    def close(self) -> None:
        """End the worker."""
        _stop(self._worker)


Worker = subprocess.Popen[str]


def _start_worker(memory_bytes: int) -> Worker:
    """Return a worker that is ready for requests.

    It is run by its file name, and -P keeps the file's folder out of its import path.
    """
    file = Path(__file__).with_name("math_worker.py")
    worker = subprocess.Popen(
        [sys.executable, "-P", str(file), str(memory_bytes)],
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


def _read_verdict(reply: str) -> Verdict | None:
    """Return the verdict of a worker's line; None if the line is none."""
    try:
        return Verdict(**json.loads(reply))
    except (ValueError, TypeError):
        return None


class _Silence(Enum):
    """Why no line came from a worker, which is gone then."""

    EXPIRED = auto()
    DIED = auto()


def _exchange(worker: Worker, request: str | None, deadline_seconds: float) -> str | _Silence:
    """Return the worker's next line after sending a request.

    The timer covers the writing too: a stopped worker leaves a full pipe. SIGPROF ends a worker
    that has used up its CPU time.
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
        is_late = expired.is_set() or worker.returncode == -signal.SIGPROF
        return _Silence.EXPIRED if is_late else _Silence.DIED
    return reply


def _stop(worker: Worker) -> None:
    """Kill the worker, wait until it is gone and close its pipes."""
    worker.kill()
    worker.communicate()
