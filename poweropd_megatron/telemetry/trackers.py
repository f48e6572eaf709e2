"""A run's metrics in TensorBoard and Weights & Biases, beside metrics.jsonl, which is the record.

Neither can hold up a run or end it: each works on a thread of its own, and one that fails is warned
about and dropped.
"""

import importlib.util
import json
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from poweropd_megatron.config.schema import TelemetryConfig
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.telemetry.sinks import replace_text

Metrics = Mapping[str, float]

START_SECONDS = 60
"""Longest that W&B's server may take to answer at the start."""
CLOSE_SECONDS = 60
"""Longest that a finished run waits for what is still being written or sent."""
INTERRUPTED_CLOSE_SECONDS = 5
"""The same of a run that a signal ended: torchrun kills it after 30 s."""


class Tracker(Protocol):
    """Where metrics go. Every method may raise anything, and may take its time."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a step, or more of them."""

    def close(self) -> None:
        """Return when everything is where it belongs."""


def check_trackers(telemetry: TelemetryConfig) -> None:
    """Return if the packages of the trackers that are asked for are installed.

    Raises: ConfigError that names the extra.
    """
    for setting, is_on, package, extra in (
        ("telemetry.tensorboard = true", telemetry.tensorboard, "tensorboard", "tensorboard"),
        (f"telemetry.wandb = '{telemetry.wandb}'", telemetry.wandb != "off", "wandb", "wandb"),
    ):
        if is_on and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{setting} needs {package}, which is not installed: "
                f"pip install 'poweropd_megatron[{extra}]', or leave the setting out"
            )


def start_trackers(
    telemetry: TelemetryConfig,
    folder: Path,
    *,
    step: int,
    settings: Mapping[str, Any],
    warn: Callable[[str], None],
) -> "Sequence[BackgroundTracker]":
    """Return the trackers that are asked for, at work in the folder of a run.

    `step` steps were done by earlier starts: what was tracked of later ones is to be replaced, and
    with 0 everything.
    """
    found = []
    if telemetry.tensorboard:
        found.append(
            BackgroundTracker(
                "TensorBoard",
                lambda: TensorBoardTracker(
                    folder / "tensorboard", first_step=step + 1 if step else 0
                ),
                warn,
            )
        )
    if telemetry.wandb != "off":
        found.append(
            BackgroundTracker(
                "Weights & Biases",
                lambda: WandbTracker(telemetry, folder, is_new=step == 0, settings=settings),
                warn,
            )
        )
    return found


class BackgroundTracker:
    """A tracker on a thread of its own; what it raises becomes one warning, and its end."""

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        """Begin to make the tracker; warn is called on the threads of write and close alone."""
        self._name = name
        self._make = make
        self._warn = warn
        self._queue: queue.SimpleQueue[tuple[int, Metrics] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._is_dropped = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Metrics) -> None:
        """Hand over the metrics of a step and return at once; values that aren't finite are not."""
        self._drop_if_failed()
        if not self._is_dropped:
            finite = {k: v for k, v in metrics.items() if v is not None and math.isfinite(v)}
            self._queue.put((step, finite))

    def close(self, *, seconds: float = CLOSE_SECONDS) -> None:
        """Wait so long for what was handed over; the rest is left behind, with a warning."""
        self._queue.put(None)
        self._thread.join(seconds)
        self._drop_if_failed()
        if self._thread.is_alive() and not self._is_dropped:
            self._drop(f"isn't done after {seconds:g} s, and is left behind")

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (item := self._queue.get()) is not None:
                tracker.write(*item)
            tracker.close()
        except Exception as error:  # Whatever it is, the run goes on.
            self._error = error

    def _drop_if_failed(self) -> None:
        if self._error is not None and not self._is_dropped:
            self._drop(f"failed ({type(self._error).__name__}: {self._error})")

    def _drop(self, what: str) -> None:
        self._is_dropped = True
        self._warn(f"{self._name} {what}: no more metrics go there; metrics.jsonl has them all")


class TensorBoardTracker:
    """Event files in a folder; on the disk when write returns."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Write to folder; what earlier starts wrote of first_step and later is no longer shown."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the metrics under their names."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases, with the same steps as metrics.jsonl.

    wandb/run.json in the run's folder holds its id, with which a resumed run goes on, and the last
    step that it was given: W&B takes no step twice, so that what a killed run sent of steps that
    are done again stays as it was.
    """

    def __init__(
        self,
        telemetry: TelemetryConfig,
        folder: Path,
        *,
        is_new: bool,
        settings: Mapping[str, Any],
    ) -> None:
        """Start a run of W&B's, or go on with that of this folder.

        Online if telemetry.wandb says "auto", wandb has an API key, and WANDB_MODE doesn't say
        otherwise; else offline.
        Raises: what wandb does, if its server doesn't answer within START_SECONDS.
        """
        import wandb

        self._state_path = folder / "wandb" / "run.json"
        state = {} if is_new else self._read_state()
        quietly = wandb.Settings(
            silent=True, console="off", init_timeout=START_SECONDS, finish_timeout=CLOSE_SECONDS
        )
        wandb.setup(quietly)
        has_key = telemetry.wandb == "auto" and wandb.login(prompt=False, verify=False)
        self._run = wandb.init(
            project=telemetry.wandb_project,
            name=folder.resolve().name,
            dir=str(folder),
            id=state.get("id"),
            resume="allow",
            config=dict(settings),
            mode=None if has_key else "offline",
            settings=quietly,
        )
        self._last_step: int = state.get("last_step", -1)

    def write(self, step: int, metrics: Metrics) -> None:
        """Send the metrics of a step, unless W&B has that step."""
        if step > self._last_step:
            self._run.log(dict(metrics), step=step, commit=True)
            self._last_step = step
            state = {"id": self._run.id, "last_step": step}
            replace_text(self._state_path, json.dumps(state) + "\n")

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()

    def _read_state(self) -> dict[str, Any]:
        """Return the state; of none, or one that a crash spoiled, W&B starts a new run."""
        try:
            state: dict[str, Any] = json.loads(self._state_path.read_text("utf-8"))
            return state
        except (OSError, ValueError):
            return {}
