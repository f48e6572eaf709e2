"""Checks that the operations share; each raises ValueError naming the argument."""

import torch
from torch import Tensor

_LARGEST_SIZE = 2**31 - 1


def check_dense(name: str, tensor: object) -> None:
    """Return if this is a dense strided tensor whose memory holds its values as they are."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a dense strided tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"{name} must be a dense strided tensor, got {kind}")
    if tensor.is_neg():
        raise ValueError(f"{name} is a lazily negated view: call .resolve_neg() first")


def check_fp32(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Return if this is a dense fp32 tensor of that shape, there."""
    check_dense(name, tensor)
    if tensor.shape != shape or tensor.dtype != torch.float32:
        raise ValueError(
            f"{name} must be {list(shape)} fp32, got {tuple(tensor.shape)} {tensor.dtype}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_writable(name: str, tensor: Tensor) -> None:
    """Return if this may be overwritten: autograd keeps the values of its leaves."""
    if tensor.requires_grad and tensor.is_leaf:
        raise ValueError(f"{name} is a leaf that requires grad and can't be written: .detach() it")


def check_integer(name: str, value: object, *, least: int) -> None:
    """Return if this is an int from `least` to 2**31 - 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    if value > _LARGEST_SIZE:
        raise ValueError(f"{name} must be <= {_LARGEST_SIZE}, got {value}")
