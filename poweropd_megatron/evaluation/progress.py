"""How far an evaluation has come: a bar on a terminal, lines elsewhere."""

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from poweropd_megatron.evaluation.answering import Answer
from poweropd_megatron.telemetry.text import format_duration


class Progress:
    """An evaluation's voice, on rank 0; on the other ranks it is silent."""

    def __init__(
        self, *, total: int, done: int, speaks: bool, terminal: Terminal | None = None
    ) -> None:
        """Count to `total` responses, of which earlier starts have done some."""
        self._terminal = terminal or Terminal(quiet=not speaks)
        self._total, self._first, self._done = total, done, done
        self._start_seconds = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]}"),
            TimeRemainingColumn(),
            console=self._terminal,
            transient=True,
            disable=not self._terminal.is_terminal,
        )
        self._task = self._bar.add_task("evaluating", total=total, completed=done, accuracy="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, lines: Iterable[str]) -> None:
        """Say some lines."""
        for line in lines:
            self._terminal.print(line, soft_wrap=True, markup=False, highlight=False)

    def advance(self, name: str, answers: Sequence[Answer]) -> None:
        """Show that more answers of a series are there."""
        self._done += len(answers)
        share = f"{100 * sum(a.verdict.correct for a in answers) / len(answers):.1f} % correct"
        self._bar.update(self._task, description=name, completed=self._done, accuracy=share)
        if not self._terminal.is_terminal:
            seconds = time.monotonic() - self._start_seconds
            left = seconds * (self._total - self._done) / (self._done - self._first)
            self.say(
                [
                    f"{self._done}/{self._total} responses, {name}: {len(answers)} more, "
                    f"{share}, left {format_duration(left)}"
                ]
            )
