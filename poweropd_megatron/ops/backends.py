"""Which kernels work on a tensor: the compiled ones of its device, or the plain torch reference."""

import functools
import importlib
import os
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

OVERRIDE = "POWEROPD_OPS"
"""Environment variable: `torch` takes the plain torch reference on every device."""
IGNORED_TARGET = -100
"""Target of rows that take no part: they are never read, and all their results are zero."""
_MODULES = {"cpu": "poweropd_megatron.ops._cpu", "cuda": "poweropd_megatron.ops._cuda"}


class Softmaxes(NamedTuple):
    """The softmax of each row over the whole vocabulary, at its target; all [N] fp32."""

    logp_N: Tensor
    """Natural log-prob of the target; 0 for ignored rows."""
    entropy_N: Tensor | None
    """In nats; None unless it was asked for."""
    maximum_N: Tensor
    """The largest logit."""
    inverse_sum_N: Tensor
    """1 / sum of e^(logit - maximum)."""


class RowKernels(Protocol):
    """The kernels over rows of logits, with arguments that were checked; see ops.rows."""

    def row_stats(
        self,
        logits_NVp: Tensor,
        targets_N: Tensor,
        *,
        first_column: int,
        vocab_size: int,
        with_entropy: bool = True,
        stats_N4: Tensor | None = None,
    ) -> Tensor:
        """Return {maximum, sum, target's logit, weighted sum} of each row."""
        ...

    def combine(
        self, stats_RN4: Tensor, targets_N: Tensor, *, with_entropy: bool = True
    ) -> Softmaxes:
        """Return one softmax a row from the states of all shards."""
        ...

    def token_reward(
        self,
        kind: str,
        teacher_logp_N: Tensor,
        student_logp_N: Tensor,
        *,
        a: float = 0.0,
        b: float = 0.0,
    ) -> Tensor:
        """Return the reward of each token."""
        ...

    def row_grad_(
        self,
        logits_NVp: Tensor,
        targets_N: Tensor,
        *,
        maximum_N: Tensor,
        inverse_sum_N: Tensor,
        grad_N: Tensor,
        first_column: int,
        vocab_size: int,
    ) -> None:
        """Write the gradient over the logits."""
        ...


def kernels_for(tensor: Tensor) -> RowKernels:
    """Return the kernels that work on the tensor.

    Raises: ValueError if POWEROPD_OPS is set to anything but torch.
    """
    found = None if reference_is_asked_for() else compiled(tensor.device.type)
    if isinstance(found, str) or found is None:
        return importlib.import_module("poweropd_megatron.ops.torch_rows")
    return found


def reference_is_asked_for() -> bool:
    """Return whether POWEROPD_OPS is torch. Raises: ValueError if it is anything else."""
    override = os.environ.get(OVERRIDE, "")
    if override not in ("", "torch"):
        raise ValueError(f"{OVERRIDE}={override}: expected torch, or leave it unset")
    return bool(override)


@functools.cache
def compiled(device_type: str) -> "RowKernels | str":
    """Return the compiled kernels of a device, or why there are none."""
    from poweropd_megatron.ops.compiled_rows import CompiledRows

    if device_type not in _MODULES:
        return f"there are none for {device_type}"
    try:
        module = importlib.import_module(_MODULES[device_type])
    except ImportError as error:
        return str(error)
    return CompiledRows(module)


def describe(device: torch.device) -> tuple[bool, str]:
    """Return whether the kernels are those to expect on a device, and a line for the log."""
    if reference_is_asked_for():
        return True, f"kernels: plain torch, as {OVERRIDE}=torch asks"
    found = compiled(device.type)
    if isinstance(found, str):
        return False, (
            f"kernels: plain torch, several times slower, since the compiled ones can't be loaded "
            f"({found}); python setup.py build_ext --inplace builds them"
        )
    return True, f"kernels: compiled, for {device.type}"
