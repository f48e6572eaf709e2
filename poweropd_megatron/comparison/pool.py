"""Training runs side by side, each by processes of its own; one that fails stops no other."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from poweropd_megatron.comparison.plan import PlannedRun
from poweropd_megatron.environment import RANK_VARIABLES
from poweropd_megatron.interruption import end_with_parent

POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0
"""How long runs may take to end after SIGTERM; they save nothing then, so it is mostly imports."""


class Process(Protocol):
    """What is asked of a started run; subprocess.Popen has it."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""


class Listener(Protocol):
    """What hears how the runs go."""

    def started(self, run: PlannedRun) -> None:
        """A run's process is there."""

    def ended(self, run: PlannedRun, error: str | None) -> None:
        """A run has ended; the error is None where it is finished."""

    def waited(self, running: Sequence[PlannedRun]) -> None:
        """A moment has passed."""


Start = Callable[[PlannedRun, int], Process]
"""Starts a run in one of the pool's slots, numbered from 0, in a process group of its own."""


def run_side_by_side(
    runs: Sequence[PlannedRun], *, jobs: int, start: Start, listener: Listener
) -> dict[PlannedRun, str | None]:
    """Return for each run what it failed of, None where it finished.

    The runs start in their order, as soon as one of `jobs` slots is free. Whatever leaves this
    function, Interrupted too, the processes have been ended before.
    """
    waiting = list(runs)
    running: dict[int, tuple[PlannedRun, Process]] = {}
    outcomes: dict[PlannedRun, str | None] = {}
    try:
        while waiting or running:
            for slot in sorted(set(range(jobs)) - running.keys())[: len(waiting)]:
                run = waiting.pop(0)
                running[slot] = (run, start(run, slot))
                listener.started(run)
            time.sleep(POLL_SECONDS)
            for slot, (run, process) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[slot]
                    outcomes[run] = _failure(run, code)
                    listener.ended(run, outcomes[run])
            listener.waited([run for run, _ in running.values()])
    finally:
        _end([process for _, process in running.values()])
    return outcomes


def command_of(run: PlannedRun, *, ranks: int) -> list[str]:
    """Return the command that trains or resumes a run, by torchrun where it has several ranks."""
    train = ["-m", "poweropd_megatron.cli.main", "train", "--config", str(run.config_path)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), *train]


def environment_of(
    slot: int, *, ranks: int, threads: int, devices: Sequence[str]
) -> dict[str, str]:
    """Return the variables of a run's processes.

    devices: the GPUs there are, as CUDA_VISIBLE_DEVICES names them; each slot takes the next
    `ranks` of them, from the first again after the last.
    """
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    environment["OMP_NUM_THREADS"] = str(threads)
    if devices:
        own = [devices[(slot * ranks + rank) % len(devices)] for rank in range(ranks)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return environment


def starter(*, ranks: int, threads: int, devices: Sequence[str]) -> Start:
    """Return what starts `poweropd train` on a run's config_path; its log is of this start."""

    def start(run: PlannedRun, slot: int) -> Process:
        with run.log_path.open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                command_of(run, ranks=ranks),
                env=environment_of(slot, ranks=ranks, threads=threads, devices=devices),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    return start


def _end(processes: Sequence[Process]) -> None:
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _failure(run: PlannedRun, code: int) -> str | None:
    """Return None for a finished run, else its exit code and the last that it said."""
    if code == 0 and run.is_finished:
        return None
    said = run.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in said if line.strip()]
    errors = [line for line in lines if line.startswith("poweropd: error: ")]
    last = (errors or lines or ["it said nothing"])[-1].removeprefix("poweropd: error: ")
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    return f"{how}: {last}"
