"""The process in which math-verify runs; `answers.MathChecker` starts it and kills it if it hangs.

It prints "ready" and then, for each line {"response", "answer"} that it reads, one line: true,
false, or null where the answer of the file itself can't be parsed. It ends with its standard input,
and a minute into any one request, so that it doesn't outlive a parent that was killed. It is run as
a file and imports nothing of this package.
"""

import json
import logging
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this.

import math_verify  # noqa: E402

ORPHAN_SECONDS = 60


def is_correct(response: str, answer: str) -> bool | None:
    """Return whether the response ends in the answer, None if the answer itself is unusable.

    The parent holds the deadline: math-verify's own are exceptions, which sympy may swallow.
    """
    marked = answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"
    gold = math_verify.parse(marked, parsing_timeout=None)
    if not gold:
        return None
    target = math_verify.parse(response, parsing_timeout=None)
    return bool(math_verify.verify(gold, target, timeout_seconds=None))


def main() -> None:
    """Answer requests until standard input ends."""
    logging.disable()
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(ORPHAN_SECONDS)
        print(json.dumps(is_correct(**json.loads(line))), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
