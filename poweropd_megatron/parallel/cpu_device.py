"""The CPU as a device for megatron.core, whose code names CUDA in places where a CPU would do.

`install()` binds the name `torch` inside megatron.core's modules, and only there, to a stand-in:
torch itself but for the calls that name CUDA. The rest of the process keeps the real torch. Two
methods of tensors can't be reached that way and are patched on the class: `cuda()`, and `type()`,
by whose "torch.cuda.FloatTensor" Megatron's optimizers tell parameters apart. For callers outside
megatron.core both do what they always did.
"""

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from poweropd_megatron.errors import ConfigError

_CPU = torch.device("cpu")
_PARTS = (
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)
"""What a run uses of Megatron, with all that these import."""


def install() -> bool:
    """Return True if megatron.core now runs on the CPU, False if CUDA made it unnecessary.

    Where CUDA is available nothing is changed. Call it before a model is built; again is harmless,
    and reaches modules of Megatron's that were imported since.

    Raises: ConfigError if Megatron has found packages whose kernels need CUDA.
    """
    if torch.cuda.is_available():
        return False
    for part in _PARTS:
        importlib.import_module(part)
    if not sys.modules["megatron.core.optimizer"].USING_PYTORCH_OPTIMIZER:
        raise ConfigError(
            "Transformer Engine or Apex is installed, and Megatron computes by kernels of theirs, "
            "which need a GPU, but torch finds none: use a machine with one, or an environment "
            "without these packages, such as bash launch/setup_env.sh makes"
        )
    _patch_tensor_methods()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.__dict__["torch"] = _stand_in()
    return True


class _Overlay(types.ModuleType):
    """A module with some names of its own and all others of another module."""

    def __init__(self, beneath: types.ModuleType, **own: Any) -> None:
        super().__init__(beneath.__name__)
        self.__dict__.update(own)
        self._beneath = beneath

    def __getattr__(self, name: str) -> Any:
        return getattr(self._beneath, name)


@functools.cache
def _stand_in() -> types.ModuleType:
    """Return what megatron.core sees as `torch`."""
    return _Overlay(
        torch,
        tensor=_on_cpu(torch.tensor),
        zeros=_on_cpu(torch.zeros),
        cuda=_cuda_of_one_cpu(),
        distributed=_Overlay(torch.distributed, all_to_all_single=_all_to_all_single),
    )


def _on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the function with device="cuda" taken for the CPU."""

    @functools.wraps(make)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return make(*args, **kwargs)

    return call


def _all_to_all_single(*args: Any, **kwargs: Any) -> Any:
    """Call torch's function with split sizes that are tensors taken for lists.

    The dispatcher of tokens to experts turns split sizes on a GPU into arrays on the CPU; those
    that are there already it leaves as they are.
    """
    for name in ("output_split_sizes", "input_split_sizes"):
        if isinstance(kwargs.get(name), torch.Tensor):
            kwargs[name] = kwargs[name].tolist()
    return torch.distributed.all_to_all_single(*args, **kwargs)


class _Stream:
    """A stream of a device whose work is done when a call returns, and each of its events."""

    def wait_stream(self, stream: "_Stream") -> None:
        """Return at once."""

    def record_event(self) -> "_Stream":
        """Return what is over already."""
        return self

    def synchronize(self) -> None:
        """Return at once."""


def _cuda_of_one_cpu() -> types.ModuleType:
    """Return torch.cuda with one device, the CPU, whose work is done when a call returns.

    Megatron's random states are kept in a generator of their own, for seeding them must not seed
    the CPU's.
    """
    generator = torch.Generator()
    return _Overlay(
        torch.cuda,
        current_device=lambda: _CPU,
        Stream=_Stream,
        current_stream=_Stream,
        stream=contextlib.nullcontext,
        synchronize=lambda: None,
        manual_seed=generator.manual_seed,
        get_rng_state=generator.get_state,
        random=types.SimpleNamespace(get_rng_state=lambda device: generator.get_state()),  # noqa: ARG005
    )


@functools.cache
def _patch_tensor_methods() -> None:
    original_cuda, original_type = torch.Tensor.cuda, torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _caller_is_megatron():
            return self
        return original_cuda(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        if isinstance(result, str) and _caller_is_megatron():
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.cuda = cuda  # type: ignore[method-assign,assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


def _caller_is_megatron() -> bool:
    """Return True if the function that calls this one was called from megatron.core."""
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return str(caller).startswith("megatron.core")
