"""How long a step takes, and how much memory beyond what was in use before it."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

Step = Callable[[], object]


class CPUMeter:
    """The clock and the kernel's account of this process."""

    @staticmethod
    def time(prepare: Step, step: Step) -> tuple[float, int]:
        """Return a step's seconds and the bytes by which the process grew."""
        prepare()
        before_bytes = _start_resident_peak()
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
        return seconds, _status_bytes("VmHWM") - before_bytes

    @staticmethod
    def allocated_peak(step: Step) -> int:
        """Return the most bytes that torch had allocated at once, beyond those before.

        Exact, since the profiler sees every allocation and release of a tensor; blind to libraries
        that allocate by themselves.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(
            activities=activities, profile_memory=True, acc_events=True
        ) as run:
            step()
        events = [
            event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"
        ]
        live_bytes = peak_bytes = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live_bytes += event.nbytes()
            peak_bytes = max(peak_bytes, live_bytes)
        return peak_bytes


class CUDAMeter:
    """The GPU's own events and torch's allocator, whose memory goes back for the next process."""

    @classmethod
    def time(cls, prepare: Step, step: Step) -> tuple[float, int]:
        """Return a step's seconds, once its memory has been allocated before, and its peak."""
        prepare()
        peak_bytes = cls.allocated_peak(step)
        prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        torch.cuda.empty_cache()
        return seconds, peak_bytes

    @staticmethod
    def allocated_peak(step: Step) -> int:
        """Return the most bytes that torch had allocated at once, beyond those before."""
        before_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before_bytes


METERS = {"cpu": CPUMeter, "cuda": CUDAMeter}


def _start_resident_peak() -> int:
    """Return the bytes that are resident now, from where the kernel's high-water mark starts anew.

    Source: proc(5), /proc/pid/clear_refs (5) and VmHWM; whole pages.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, value = line.split(":", 1)
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
