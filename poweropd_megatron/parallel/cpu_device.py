"""The CPU as a device for megatron.core, whose code names CUDA in places where a CPU would do.

`install()` binds the name `torch` inside megatron.core's modules, and only there, to a stand-in
that sends CUDA-named calls to the CPU; the rest of the process keeps the real torch. Four tensor
methods can't be reached that way and are patched on the class, for calls that fail without CUDA in
any case: `cuda`, `to`, `new_empty` with a CUDA device, and `type()` as asked by megatron.core,
which tells parameters apart by the name "torch.cuda.FloatTensor".
"""

import contextlib
import functools
import importlib
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from poweropd_megatron.parallel import cpu_cuda_api

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like "
    "rand rand_like randint randn tensor zeros zeros_like"
).split()
_installed = False


def install() -> bool:
    """Return True if megatron.core now runs on the CPU, False where CUDA is available and nothing
    was changed.

    Call it before a model is built; again is harmless, and also reaches modules imported since.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        _patch_tensor_methods()
        _installed = True
    _import_what_is_imported_late()
    stand_in = _stand_in()
    for module in _megatron_modules():
        if module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = stand_in
    return True


def is_installed() -> bool:
    """Return True after an install() that took effect."""
    return _installed


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return call


@functools.cache
def _stand_in() -> types.ModuleType:
    """Return the module that megatron.core sees as `torch`: torch itself but for what names a CUDA
    device.
    """

    class CpuTorch(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    module = CpuTorch("torch")
    for name in _FACTORIES:
        setattr(module, name, _on_cpu(getattr(torch, name)))
    module.__dict__["cuda"] = cpu_cuda_api.build()
    module.__dict__["distributed"] = _distributed()
    return module


def _distributed() -> types.ModuleType:
    """Return torch.distributed with all_to_all_single taking its splits as tensors, as NCCL's
    callers pass them.
    """

    class CpuDistributed(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.distributed, name)

    def as_list(splits: Any) -> Any:
        return splits.tolist() if hasattr(splits, "tolist") else splits

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return torch.distributed.all_to_all_single(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs
        )

    module = CpuDistributed("torch.distributed")
    module.__dict__["all_to_all_single"] = all_to_all_single
    return module


def _import_what_is_imported_late() -> None:
    """Import the packages whose modules megatron.core otherwise imports inside functions."""
    for package_name in ("megatron.core.distributed", "megatron.core.optimizer"):
        package = importlib.import_module(package_name)
        for entry in pkgutil.iter_modules(package.__path__, package_name + "."):
            with contextlib.suppress(ImportError):
                importlib.import_module(entry.name)


def _megatron_modules() -> Iterator[types.ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and isinstance(module, types.ModuleType):
            yield module


def _patch_tensor_methods() -> None:
    original_to = torch.Tensor.to
    original_type = torch.Tensor.type
    original_new_empty = torch.Tensor.new_empty

    def cuda(self: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and asked_by.startswith("megatron.core"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.cuda = cuda  # type: ignore[method-assign,assignment]
    torch.Tensor.to = to  # type: ignore[method-assign,assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]
    torch.Tensor.new_empty = _on_cpu(original_new_empty)  # type: ignore[method-assign]
