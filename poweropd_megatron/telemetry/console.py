"""What a run says while it runs: a live display on a terminal, plain lines elsewhere, and a log."""

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from poweropd_megatron.interruption import Interrupted
from poweropd_megatron.telemetry.text import (
    MISSING,
    evaluation_measures,
    format_change,
    format_duration,
    format_measure,
    format_number,
    measure_label,
    ordered_measures,
)

SHOWN_METRICS = ("reward/mean", "grad_norm", "response_length/mean", "tokens_per_second")


class Console:
    """The run's voice, on rank 0. A context manager, so that the live display is always closed.

    On a terminal the steps move a live display; elsewhere every log_interval-th step is a line. The
    log file has those lines in both cases, with everything else that was said, and is appended to.
    """

    def __init__(
        self,
        log_path: Path,
        *,
        total_steps: int,
        log_interval: int,
        terminal: Terminal | None = None,
    ) -> None:
        """Speak to log_path and to terminal, which is standard output unless it is given."""
        self._log_path = log_path
        self._total_steps = total_steps
        self._log_interval = log_interval
        self._terminal = terminal if terminal is not None else Terminal()
        self._live: Live | None = None
        self._phase = ""
        self._first_step = self._last_step = 0
        self._start_seconds = time.monotonic()
        self._metrics: Mapping[str, float] = {}
        self._accuracy = MISSING

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close_live()
        if kind is not None and kind is not Interrupted:
            self._log(f"ended by {kind.__name__}: {error}")

    @property
    def last_step(self) -> int:
        """Return the last step that was finished, by this start or by earlier ones."""
        return self._last_step

    def info(self, text: str) -> None:
        """Say a line or several."""
        for line in text.splitlines():
            self._say(line)

    def warning(self, text: str) -> None:
        """Say something that the user should look into."""
        for line in text.splitlines():
            self._say(f"WARNING: {line}", style="yellow")

    def start(self, step: int) -> None:
        """Begin to count time and steps; `step` steps were done by earlier starts of this run."""
        self._first_step = self._last_step = step
        self._start_seconds = time.monotonic()
        resumed = f", going on after step {step}" if step else ""
        self._say(f"training for {self._total_steps} steps{resumed}")
        if self._terminal.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._terminal, transient=True)
            self._live.start()

    def phase(self, name: str) -> None:
        """Show what is being done now, such as "rollout"; seen on the live display only."""
        self._phase = name

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step; a metric that is missing is shown as "-"."""
        self._last_step = step
        self._metrics = metrics
        if step % self._log_interval == 0 or step == self._total_steps:
            left = f"left {format_duration(self._remaining_seconds())}"
            line = "  ".join([f"step {step}/{self._total_steps}", *self._shown_metrics(), left])
            if self._live is None:
                self._say(line)
            else:
                self._log(line)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say the results of an evaluation, from its eval/... metrics; a line for each source."""
        for source, measures in evaluation_measures(metrics).items():
            names = ordered_measures(measures)
            if not source and names:
                self._accuracy = format_measure(measures, names[0])
            words = [f"{measure_label(name)} {format_measure(measures, name)}" for name in names]
            label = f"evaluation after step {step}" + (f", {source}" if source else "")
            self._say(f"{label}: {', '.join(words)}", style="bold")

    def finish(self, summary: Mapping[str, Any], output_dir: Path) -> None:
        """Close the live display; say what improved, how long it took and where everything is."""
        self._close_live()
        norm = summary.get("grad_norm") or {}
        self._say(
            f"finished {summary.get('steps', MISSING)} steps in "
            f"{format_duration(summary.get('train_seconds'))}; gradient norm: median "
            f"{format_number(norm.get('median'))}, max {format_number(norm.get('max'))}",
            style="bold green",
        )
        before, after = summary.get("before") or {}, summary.get("after") or {}
        names = ordered_measures(before.keys() | after.keys())
        if names:
            self._say(f"  {'':<22}{'before':<16}{'after':<16}change")
        for name in names:
            self._say(
                f"  {measure_label(name):<22}{format_measure(before, name):<16}"
                f"{format_measure(after, name):<16}"
                f"{format_change(before.get(name), after.get(name), name)}"
            )
        places = {
            "export": summary.get("export") or MISSING,
            "report": output_dir / "report.html",
            "metrics": output_dir / "metrics.jsonl",
            "checkpoints": output_dir / "checkpoints",
        }
        for name, place in places.items():
            self._say(f"  {name:<22}{place}")

    def _say(self, line: str, style: str = "") -> None:
        stamped = self._log(line)
        shown = Text(line, style) if self._terminal.is_terminal else Text(stamped)
        self._terminal.print(shown, soft_wrap=True)

    def _log(self, line: str) -> str:
        stamped = f"{datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}  {line}"
        with self._log_path.open("a", encoding="utf-8") as file:
            file.write(stamped + "\n")
        return stamped

    def _close_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _shown_metrics(self) -> list[str]:
        shown = [f"{name} {format_number(self._metrics.get(name))}" for name in SHOWN_METRICS]
        return [*shown, f"accuracy {self._accuracy}"]

    def _remaining_seconds(self) -> float | None:
        done = self._last_step - self._first_step
        if done == 0:
            return None
        elapsed = time.monotonic() - self._start_seconds
        return (self._total_steps - self._last_step) * elapsed / done

    def _render(self) -> RenderableType:
        elapsed = format_duration(time.monotonic() - self._start_seconds)
        progress = Table.grid(padding=(0, 1))
        progress.add_row(
            Text(f"step {self._last_step}/{self._total_steps}", "bold"),
            ProgressBar(total=self._total_steps, completed=self._last_step, width=30),
            Text(f"{elapsed}, left {format_duration(self._remaining_seconds())}"),
            Text(self._phase, "cyan"),
        )
        return Group(progress, Text("  ".join(self._shown_metrics()), "dim"))
