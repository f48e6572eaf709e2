"""A frozen model's parameters in CPU memory while nothing is computed with them."""

import time
from collections.abc import Iterable

import torch
from torch import Tensor

_ALIGNMENT = 256
"""Bytes; what torch's own allocator aligns tensors to on a GPU at least."""


class OffloadedParameters:
    """Parameters that are on the device between `load` and `unload`, and else on the CPU.

    They are in one buffer for each dtype: one copy brings all of them, and a single block of device
    memory comes and goes. Their CPU copy, pinned for a GPU, is made once and is never written to
    again, so that unloading copies nothing.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
        """Move the parameters to the CPU. They must be frozen; shared ones may come twice."""
        self._device = device
        self._is_loaded = False
        self._by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in dict.fromkeys(parameters):
            self._by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self._on_cpu = {
            dtype: torch.empty(
                sum(_room(parameter) for parameter in parameters),
                dtype=dtype,
                pin_memory=device.type == "cuda",
            )
            for dtype, parameters in self._by_dtype.items()
        }
        for dtype, parameters in self._by_dtype.items():
            for parameter, view in zip(
                parameters, _views(self._on_cpu[dtype], parameters), strict=True
            ):
                view.copy_(parameter.data)
        self._point_to(self._on_cpu)

    @property
    def num_bytes(self) -> int:
        """Return the device memory that unloading frees."""
        return sum(buffer.nbytes for buffer in self._on_cpu.values())

    def load(self) -> float:
        """Return the seconds that it took to bring the parameters onto the device; 0 if they are
        there.
        """
        if self._is_loaded:
            return 0.0
        start = time.perf_counter()
        self._point_to(
            {
                dtype: buffer.to(self._device, copy=True, non_blocking=True)
                for dtype, buffer in self._on_cpu.items()
            }
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._is_loaded = True
        return time.perf_counter() - start

    def unload(self) -> None:
        """Free the device memory; what was queued before still reads the parameters."""
        self._point_to(self._on_cpu)
        self._is_loaded = False

    def _point_to(self, buffers: dict[torch.dtype, Tensor]) -> None:
        for dtype, parameters in self._by_dtype.items():
            for parameter, view in zip(parameters, _views(buffers[dtype], parameters), strict=True):
                parameter.data = view


def _room(parameter: torch.nn.Parameter) -> int:
    """Return the elements that a parameter takes in a buffer, so that the next one is aligned."""
    step = _ALIGNMENT // parameter.element_size()
    return -(-parameter.numel() // step) * step


def _views(buffer: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    parts = torch.split(buffer, [_room(parameter) for parameter in parameters])
    return [
        part[: parameter.numel()].view(parameter.shape)
        for part, parameter in zip(parts, parameters, strict=True)
    ]
