"""Parts of a conversion dealt out over processes, with progress on stderr."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from poweropd_megatron.errors import InputError, UserError

Work = Callable[[int], dict[str, Any]]


def run_parts(
    parts: Mapping[int, int],
    work: Work,
    done: Callable[[int, dict[str, Any]], None],
    *,
    num_workers: int,
    verb: str,
) -> None:
    """Do `work` for each part and hand what it returns to `done`, in the order of completion.

    `done` is called here, while the workers go on: it may wait for the disk.
    parts holds the bytes of each part; the workers are forked, so nothing is copied to them.
    Raises: UserError and OSError as a worker raised them, or InputError if one was killed.
    """
    progress = Progress(verb, sum(parts.values()))

    def finish(part: int, facts: dict[str, Any]) -> None:
        done(part, facts)
        progress.add(parts[part])

    num_workers = min(num_workers, len(parts))
    if num_workers <= 1:
        for part in parts:
            finish(part, work(part))
    else:
        with ExitStack() as stack:
            workers = [stack.enter_context(_Worker(work)) for _ in range(num_workers)]
            _deal(list(parts), workers, finish)
    progress.close()


def _deal(
    waiting: list[int], workers: list["_Worker"], finish: Callable[[int, dict[str, Any]], None]
) -> None:
    """Give each worker a part whenever it has none."""
    waiting.reverse()
    by_connection = {worker.connection: worker for worker in workers}
    for worker in workers:
        worker.send(waiting.pop())
    while by_connection:
        for connection in wait(list(by_connection)):
            assert isinstance(connection, Connection)
            worker = by_connection[connection]
            part, facts = worker.receive()
            if waiting:
                worker.send(waiting.pop())
            else:
                del by_connection[connection]
            finish(part, facts)


class _Worker:
    """A forked process that does parts until it is killed or its parent is gone."""

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, other_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(work, other_end, os.getpid()), daemon=True
        )
        self._process.start()
        other_end.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()

    def send(self, part: int) -> None:
        """Let the worker do a part. Raises: InputError if it was killed."""
        try:
            self.connection.send(part)
        except OSError:
            raise self._was_killed() from None

    def receive(self) -> tuple[int, dict[str, Any]]:
        """Return the part that is done, and its facts; raise what the worker raised."""
        try:
            part, facts, failure = self.connection.recv()
        except (EOFError, OSError):
            raise self._was_killed() from None
        if failure is not None:
            raise failure
        return part, facts

    def _was_killed(self) -> InputError:
        self._process.join()
        return InputError(
            f"--workers: one of them ended with code {self._process.exitcode} (killed for "
            "memory?); run the same command again, with fewer"
        )


def _serve(work: Work, connection: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    while True:
        while not connection.poll(0.5):
            exit_if_abandoned(parent)
        part = connection.recv()
        try:
            connection.send((part, work(part), None))
        except (UserError, OSError) as error:
            connection.send((part, {}, error))
        except Exception as error:
            failure = RuntimeError(f"part {part}: {error}\n{traceback.format_exc()}")
            connection.send((part, {}, failure))


def exit_if_abandoned(parent: int) -> None:
    """End this process if it is a worker whose parent has been killed."""
    if os.getppid() != parent and os.getpid() != parent:
        os._exit(1)


class Progress:
    """How far a conversion is: a line that is redrawn on a terminal, one every 10 s elsewhere."""

    def __init__(self, verb: str, total_bytes: int) -> None:
        self._verb, self._total_bytes, self._done_bytes = verb, total_bytes, 0
        self._begin = self._told = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def add(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        self._done_bytes += num_bytes
        now = time.monotonic()
        if self._is_terminal or now - self._told > 10:
            self._told = now
            self._tell("\r" if self._is_terminal else "", "" if self._is_terminal else "\n")

    def close(self) -> None:
        """Tell that all is done."""
        self._tell("\r" if self._is_terminal else "", "\n")

    def _tell(self, before: str, after: str) -> None:
        rate = self._done_bytes / max(time.monotonic() - self._begin, 1e-6)
        left_seconds = (self._total_bytes - self._done_bytes) / max(rate, 1.0)
        text = (
            f"{self._verb} {self._done_bytes / 1e9:.2f} of {self._total_bytes / 1e9:.2f} GB, "
            f"{rate / 1e6:.0f} MB/s, {left_seconds:.0f} s left"
        )
        print(f"{before}{text:70}{after}", end="", file=sys.stderr, flush=True)
