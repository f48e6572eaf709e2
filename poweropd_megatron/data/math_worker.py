"""The process in which math-verify runs; `answers.MathChecker` starts it and kills it if it hangs.

It prints "ready" and then, for each line {"response", "answer", "tolerance", "cpu_seconds"} that it
reads, one line: the fields of an answers.Verdict. It ends with its standard input, and a minute
into any one request, so that it doesn't outlive a parent that was killed. SIGPROF ends it when a
request has taken its seconds of CPU time: nothing that sympy does can catch that. A request that
needs more memory than the command line allows, in bytes, is given up. It is run as a file and
imports nothing of this package. What libraries print to standard output goes to standard error.
"""

import os

REPLIES = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

import json  # noqa: E402
import logging  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this.

import math_verify  # noqa: E402

ORPHAN_SECONDS = 60


class MemoryWatch(logging.Handler):
    """Notices the MemoryErrors that math-verify takes for wrong answers, but for a debug record."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def emit(self, record: logging.LogRecord) -> None:
        """Look at the error that a record tells of."""
        if record.exc_info and isinstance(record.exc_info[1], MemoryError):
            self.seen = True


def judge(response: str, answer: str, tolerance: float | None) -> dict[str, Any]:
    """Return whether the response ends in the answer, and what was read of it.

    It has no time limits of math-verify: these are exceptions, which sympy may swallow.
    """
    marked = answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"
    gold = math_verify.parse(marked, parsing_timeout=None)
    if not gold:
        return {"correct": False, "failure": "unreadable answer"}
    target = math_verify.parse(response, parsing_timeout=None)
    correct = math_verify.verify(gold, target, timeout_seconds=None)
    if not correct and tolerance is not None and target:
        correct = is_within(gold[0], target[0], tolerance)
    extracted = next((str(text) for text in reversed(target) if isinstance(text, str)), None)
    return {"correct": bool(correct), "extracted": extracted}


def is_within(gold: Any, target: Any, tolerance: float) -> bool:
    """Return whether two numbers, or lists of as many, differ by at most the tolerance."""
    golds, targets = numbers(gold), numbers(target)
    if not golds or targets is None or len(golds) != len(targets):
        return False
    slack = tolerance * (1 + 1e-9)
    return all(abs(a - b) <= slack for a, b in zip(golds, targets, strict=True))


def numbers(parsed: Any) -> list[float] | None:
    """Return the values of what was parsed, in ascending order; None if it isn't real numbers."""
    try:
        elements = list(parsed.args) if type(parsed).__name__ == "FiniteSet" else [parsed]
        return sorted(float(element) for element in elements)
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None


def main() -> None:
    """Answer requests until standard input ends."""
    watch = MemoryWatch()
    logger = logging.getLogger("math_verify")
    logger.addHandler(watch)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    print("ready", file=REPLIES, flush=True)
    for line in sys.stdin:
        signal.alarm(ORPHAN_SECONDS)
        watch.seen = False
        try:
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, request.pop("cpu_seconds"))
            verdict = judge(**request)
        except MemoryError:
            watch.seen = True
        if watch.seen:
            verdict = {"correct": False, "failure": "memory"}
        print(json.dumps(verdict), file=REPLIES, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


if __name__ == "__main__":
    main()
