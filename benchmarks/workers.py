"""The cases of a benchmark, each in a process of its own, measured in turns."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

PRELOADED = (
    "torch",
    "poweropd_megatron.ops.lm_head",
    "poweropd_megatron.ops.fused_policy_gradient",
    "poweropd_megatron.ops.fused_vocabulary_gradient",
    "megatron.core.fusions.fused_cross_entropy",
)
"""What the processes are forked with, so that each starts in no time."""


class Case(Protocol):
    """What is measured; made in the process that it runs in."""

    @property
    def steps(self) -> Mapping[str, Callable[[], object]]:
        """Return the steps to be timed."""
        ...

    def prepare(self) -> None:
        """Undo what the last step did to its inputs; not timed."""
        ...


@dataclass
class Measured:
    """The best of a step's rounds."""

    seconds: float = float("inf")
    """The least."""
    peak_bytes: int = 0
    """The most memory that the step took at once: on a CPU, by which the process grew."""
    allocated_bytes: int | None = None
    """The most that torch allocated at once; None unless it was asked for."""


def measure(
    builds: Mapping[str, Callable[[], Case]],
    *,
    device: str,
    rounds: int,
    with_allocations: bool,
) -> dict[str, dict[str, Measured]]:
    """Return what was measured of each case and step: in each round every step has its turn once.

    So what disturbs the machine for a while disturbs all of them, and the minima compare.
    Raises: RuntimeError if a case fails; it has printed why.
    """
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(_Worker(name, build, device))
            for name, build in builds.items()
        }
        results = {
            name: {step: Measured() for step in worker.receive()}
            for name, worker in workers.items()
        }
        turns = [(name, step) for name, steps in results.items() for step in steps]
        for number in range(rounds):
            print(f"\r  round {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
            for name, step in turns:
                seconds, peak_bytes = workers[name].ask("time", step)
                result = results[name][step]
                result.seconds = min(result.seconds, seconds)
                result.peak_bytes = max(result.peak_bytes, peak_bytes)
        print(file=sys.stderr)
        if with_allocations:
            for name, step in turns:
                results[name][step].allocated_bytes = workers[name].ask("allocations", step)
    return results


class _Worker:
    """A process that builds a case and then runs its steps on demand."""

    def __init__(self, name: str, build: Callable[[], Case], device: str) -> None:
        self.name = name
        # torch reads these when it is first imported or compiles, in the process that is forked.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        # What is preloaded may touch CUDA, which doesn't survive a fork.
        context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
        if device == "cpu":
            context.set_forkserver_preload(list(PRELOADED))
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, device, other_end), daemon=True)
        self._process.start()
        other_end.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def ask(self, what: str, step: str) -> Any:
        """Return the process's answer."""
        self._connection.send((what, step))
        return self.receive()

    def receive(self) -> Any:
        """Return what the process sends next."""
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError(f"the case {self.name!r} failed: see above") from None


def _serve(build: Callable[[], Case], device: str, connection: Connection) -> None:
    import meters

    meter = meters.METERS[device]
    case = build()
    connection.send(list(case.steps))
    while True:
        what, name = connection.recv()
        if what == "allocations":
            case.prepare()
            connection.send(meter.allocated_peak(case.steps[name]))
        else:
            connection.send(meter.time(case.prepare, case.steps[name]))
