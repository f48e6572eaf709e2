"""Ctrl-C and SIGTERM as an exception that ends a run in good order."""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []
_PR_SET_PDEATHSIG = 1
"""Source: prctl(2), linux/prctl.h."""
_LIBC = ctypes.CDLL(None)


class Interrupted(BaseException):
    """A signal asked the process to end; no error, so that nothing that handles those takes it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        self.is_told = False
        """Whether the user has been told."""


@contextmanager
def raising() -> Iterator[None]:
    """Raise Interrupted in the block, which the main thread runs, when a signal comes.

    The signals stay ignored once Interrupted leaves the block.
    """
    _received.clear()
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _raise) for number in heard}
    try:
        with raised():
            yield
    finally:
        if not _received:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def raised() -> Iterator[None]:
    """Raise Interrupted out of the block if a signal has come, whatever the block ends with.

    A signal that comes during a call into C, such as a collective, is raised when that returns; an
    error that it returns with, because the other ranks have gone, is the signal's too. Further
    signals are ignored: torchrun sends every rank another one, and what is left to do is short.
    """
    try:
        yield
    except BaseException as error:
        if not _received:
            raise
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if isinstance(error, Interrupted):
            raise
        raise Interrupted(_received[0]) from None


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal end the process at once in the block, which does nothing but wait in C, where
    Interrupted would come only when the wait is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the one that started it dies, however.

    For subprocess's preexec_fn; what starts the process is its parent's thread, which must live on.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _raise(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise Interrupted(_received[0])
