"""torchrun, except that it ends with the exit code of the rank that failed first, in one line.

Plain torchrun ends with 1 and a traceback of its own whatever happened, so bad input (exit code 2,
which the ranks have explained) would look like a crash.
"""

import logging
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Until torchrun listens, Ctrl-C just ends this.

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

EXPLAINED_BY_RANKS = (2, 128 + signal.SIGINT, 128 + signal.SIGTERM)
REPORTED_HERE = ("failed (exitcode", "Sending process", "Received %s death signal")


def is_news(record: logging.LogRecord) -> bool:
    """Return whether a log record of torchrun says more than this script's last line will."""
    return not str(record.msg).startswith(REPORTED_HERE)


def main(argv: list[str]) -> int:
    """Return 0, the first failure's exit code, or 128 + the signal that ended the rank or this."""
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(is_news)
    try:
        run.run(run.parse_args(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {rank} was ended by {failure.signal_name()}", file=sys.stderr)
            return 128 - failure.exitcode
        if failure.exitcode not in EXPLAINED_BY_RANKS:
            print(f"rank {rank} failed first, with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
