"""Seconds spent in the phases of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRAINING_PHASES = ("rollout", "teacher", "student")
"""Those that every step has; evaluations and checkpoints come now and then."""


class Clock:
    """Adds up the seconds of named phases until they are read."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._read_at = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block under `name`, to the end of the work that it queued on a GPU."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Return time/<phase>_seconds, and time/step_seconds, since the last reading."""
        now = time.perf_counter()
        seconds = {f"time/{name}_seconds": value for name, value in self._seconds.items()}
        seconds["time/step_seconds"] = now - self._read_at
        self._seconds, self._read_at = {}, now
        return seconds
