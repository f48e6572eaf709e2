"""What megatron.core finds under `torch.cuda` on a machine without CUDA: one device, the CPU,
without streams.
"""

import contextlib
import time
import types
from typing import Any

import torch

_CPU = torch.device("cpu")


class Stream:
    """A stream on which everything has already happened."""

    device = _CPU

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Return the event, recorded now."""
        event = event or Event()
        event.record()
        return event


class Event:
    """An event of a stream on which everything has already happened."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, _stream: Stream | None = None) -> None:
        """Note the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1e3

    def wait(self, _stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        """Return True."""
        return True


def build() -> types.ModuleType:
    """Return the module; what it doesn't define is torch.cuda's own, and fails as there."""

    class CpuCuda(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.cuda, name)

    def get_rng_state(_device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, _device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    module = CpuCuda("torch.cuda")
    module.__dict__.update(
        Stream=Stream,
        Event=Event,
        current_device=lambda: _CPU,
        device_count=lambda: 1,
        set_device=lambda _device: None,
        synchronize=lambda _device=None: None,
        empty_cache=lambda: None,
        current_stream=lambda _device=None: Stream(),
        default_stream=lambda _device=None: Stream(),
        stream=lambda _stream: contextlib.nullcontext(),
        random=types.SimpleNamespace(get_rng_state=lambda device=None: torch.get_rng_state()),
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        manual_seed=manual_seed,
        manual_seed_all=manual_seed,
        default_generators=(torch.default_generator,),
        is_current_stream_capturing=lambda: False,
    )
    return module
