"""Ranks for the tests, without the seconds that each of them would need to import Megatron.

multiprocessing's fork server imports the modules once per test session. The ranks of a call are
forked from it in milliseconds and end with the call, so that no process group, patch or thread of
one layout reaches the next.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

GRACE_SECONDS = 3.0
"""How long the others may still answer after a failure; most of them wait for the failed rank."""


class RankError(AssertionError):
    """A call failed; the message has the number and the traceback of each rank that failed."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    world_size: int
    store_file: str
    timeout_seconds: float


class _Reply(NamedTuple):
    succeeded: bool
    value: Any
    """The result, or the text of the error."""


@dataclass(frozen=True, kw_only=True)
class _Rank:
    process: BaseProcess
    connection: Connection
    stack_file: Path


class RankPool:
    """Runs functions on ranks that are forked from a process with the modules in memory.

    The process is multiprocessing's one fork server: the modules of its first user are the ones
    that are loaded.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pytest", *preload])

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        world_size: int,
        timeout_seconds: float = 120.0,
    ) -> list[Any]:
        """Return what the function returned on each rank; the default process group is gloo's.

        The function must be importable by its name; arguments and results must be picklable.
        Raises: RankError if it raised on a rank, a rank died, or the time ran out.
        All ranks are gone afterwards.
        """
        _start_server_with_our_path()
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            call = _Call(
                function=function,
                args=args,
                world_size=world_size,
                store_file=str(Path(folder, "store")),
                timeout_seconds=timeout_seconds,
            )
            message = pickle.dumps(call)
            ranks: list[_Rank] = []
            try:
                for number in range(world_size):
                    ranks.append(self._fork(number, message, Path(folder, f"stack-{number}")))
                replies = _replies(ranks, timeout_seconds)
            finally:
                for rank in ranks:
                    rank.process.kill()
                for rank in ranks:
                    rank.process.join()
                    rank.connection.close()
        if all(reply.succeeded for reply in replies):
            return [reply.value for reply in replies]
        raise RankError(
            "\n".join(
                f"{function.__name__}, rank {number} of {world_size}: {reply.value}"
                for number, reply in enumerate(replies)
                if not reply.succeeded
            )
        )

    def _fork(self, number: int, message: bytes, stack_file: Path) -> _Rank:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_be_rank, args=(number, theirs, message, stack_file), daemon=True
        )
        process.start()
        theirs.close()
        return _Rank(process=process, connection=ours, stack_file=stack_file)


def _start_server_with_our_path() -> None:
    """Start the fork server, once; Python 3.12 doesn't hand it sys.path, which its imports need."""
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if inherited is not None:
            os.environ["PYTHONPATH"] = inherited


def _replies(ranks: Sequence[_Rank], timeout_seconds: float) -> list[_Reply]:
    """Return the reply of each rank; one that gives none in time is asked where it is."""
    deadline = time.monotonic() + timeout_seconds
    limit = f"{timeout_seconds:g} s"
    replies: dict[int, _Reply] = {}
    while len(replies) < len(ranks):
        waiting = {
            rank.connection: number for number, rank in enumerate(ranks) if number not in replies
        }
        answered = wait(list(waiting), max(deadline - time.monotonic(), 0))
        if not answered:
            break
        for connection in answered:
            number = waiting[cast(Connection, connection)]
            replies[number] = _receive(ranks[number])
            if not replies[number].succeeded and deadline > time.monotonic() + GRACE_SECONDS:
                deadline = time.monotonic() + GRACE_SECONDS
                limit = f"{GRACE_SECONDS:g} s of rank {number}'s failure"
    return [
        replies.get(number) or _Reply(False, f"no answer within {limit}; it was at\n{_stack(rank)}")
        for number, rank in enumerate(ranks)
    ]


def _receive(rank: _Rank) -> _Reply:
    try:
        reply: _Reply = pickle.loads(rank.connection.recv_bytes())
        return reply
    except (EOFError, ConnectionError):
        rank.process.join()
        return _Reply(False, f"died with exit code {rank.process.exitcode}")


def _stack(rank: _Rank) -> str:
    """Return the Python stack of a rank that gives no answer."""
    os.kill(cast(int, rank.process.pid), signal.SIGUSR1)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if text := rank.stack_file.read_text():
            return text
    return "an unknown place"


def _be_rank(number: int, connection: Connection, message: bytes, stack_file: Path) -> None:
    """Answer one call, then stay: others may still wait in the call's last collective."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with stack_file.open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        connection.send_bytes(_answer(number, message))
        parent.join()


def _answer(number: int, message: bytes) -> bytes:
    try:
        call: _Call = pickle.loads(message)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(call.store_file, call.world_size),
            rank=number,
            world_size=call.world_size,
            timeout=timedelta(seconds=call.timeout_seconds),
        )
        return pickle.dumps(_Reply(True, call.function(*call.args)))
    except BaseException:
        return pickle.dumps(_Reply(False, traceback.format_exc()))
