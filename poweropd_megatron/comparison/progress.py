"""What a comparison says while its runs go on: a line for each, and live bars on a terminal."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from poweropd_megatron.comparison.plan import PlannedRun
from poweropd_megatron.errors import InputError
from poweropd_megatron.telemetry.sinks import read_jsonl
from poweropd_megatron.telemetry.text import (
    evaluation_measures,
    format_duration,
    format_measure,
    ordered_measures,
)

SECONDS_BETWEEN_READS = 2.0


class ComparisonProgress:
    """The comparison's voice; a context manager, so that the live bars are always closed."""

    def __init__(
        self, *, num_runs: int, num_waiting: int, jobs: int, terminal: Terminal | None = None
    ) -> None:
        """Speak of the num_waiting of num_runs that are not finished yet."""
        self._terminal = terminal if terminal is not None else Terminal()
        self._num_runs = num_runs
        self._num_ended = num_runs - num_waiting
        self._jobs = jobs
        self._begin_seconds: dict[PlannedRun, float] = {}
        self._run_seconds: list[float] = []
        self._last_read_seconds = 0.0
        self._tasks: dict[PlannedRun, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            console=self._terminal,
            transient=True,
            disable=not self._terminal.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def started(self, run: PlannedRun) -> None:
        """Begin a run's bar."""
        self._begin_seconds[run] = time.monotonic()
        self._tasks[run] = self._bars.add_task(run.name, total=run.config.train_steps)

    def ended(self, run: PlannedRun, error: str | None) -> None:
        """Say what a run came to, and how long the others may take."""
        self._bars.remove_task(self._tasks.pop(run))
        seconds = time.monotonic() - self._begin_seconds[run]
        self._run_seconds.append(seconds)
        self._num_ended += 1
        count = f"[{self._num_ended}/{self._num_runs}] {run.name}"
        if error is not None:
            self.say(f"{count} FAILED after {format_duration(seconds)}: {error}", style="bold red")
            return
        self.say(
            f"{count} finished in {format_duration(seconds)}: {_gain(run)}{self._left()}",
            style="green",
        )

    def waited(self, running: Sequence[PlannedRun]) -> None:
        """Move the bars."""
        now = time.monotonic()
        if self._bars.disable or now - self._last_read_seconds < SECONDS_BETWEEN_READS:
            return
        self._last_read_seconds = now
        for run in running:
            self._bars.update(self._tasks[run], completed=_last_step(run))

    def say(self, line: str, style: str = "") -> None:
        """Say a line."""
        self._terminal.print(Text(line, style), soft_wrap=True)

    def _left(self) -> str:
        num_left = self._num_runs - self._num_ended
        if not num_left:
            return ""
        rounds = -(-num_left // self._jobs)
        mean_seconds = sum(self._run_seconds) / len(self._run_seconds)
        return f"; about {format_duration(rounds * mean_seconds)} left"


def _gain(run: PlannedRun) -> str:
    """Return the best known measure of the first and the last evaluation."""
    records = read_jsonl(run.folder / "metrics.jsonl")
    measures = [evaluation_measures(record).get("", {}) for record in records]
    evaluated = [measure for measure in measures if measure]
    names = ordered_measures(evaluated[-1]) if evaluated else []
    if not names:
        return "not evaluated"
    before, after = (format_measure(evaluated[i], names[0]) for i in (0, -1))
    return f"{names[0].replace('_', ' ')} {before} \N{RIGHTWARDS ARROW} {after}"


def _last_step(run: PlannedRun) -> int:
    try:
        records = read_jsonl(run.folder / "metrics.jsonl")
    except (OSError, InputError):
        return 0
    return int(records[-1]["step"]) if records else 0
