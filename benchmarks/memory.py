"""How much memory a step takes beyond what the process had before it."""

from collections.abc import Callable
from pathlib import Path

import torch


def allocated_peak(step: Callable[[], object]) -> int:
    """Return the most bytes that torch had allocated at once during the step, beyond those before.

    Exact, since the profiler sees every allocation and release of a tensor; blind to libraries that
    allocate by themselves.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as run:
        step()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    live_bytes = peak_bytes = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live_bytes += event.nbytes()
        peak_bytes = max(peak_bytes, live_bytes)
    return peak_bytes


def start_resident_peak() -> int:
    """Return the bytes that are resident now, from where the kernel's high-water mark starts anew.

    Source: proc(5), /proc/pid/clear_refs (5) and VmHWM; whole pages.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def resident_peak() -> int:
    """Return the most bytes that were resident since start_resident_peak()."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, value = line.split(":", 1)
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
