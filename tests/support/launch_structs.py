"""The structs of csrc/rows.h, which the kernels' launches take, from tensors.

Shapes: N rows, Vp columns of a shard.
"""

import ctypes

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The order of csrc's DType."""


class LogitRows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("first_column", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("width", ctypes.c_int64),
    )


class RowScales(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("maximum", "inverse_sum", "grad"))


class Combined(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("logp", "entropy", "maximum", "inverse_sum")
    )


def logit_rows(logits_NVp: Tensor, first_column: int, columns: int) -> LogitRows:
    """Return the rows of a shard of which some columns are of the vocabulary."""
    num_rows, width = logits_NVp.shape
    return LogitRows(
        data=logits_NVp.data_ptr(),
        dtype=DTYPES[logits_NVp.dtype],
        stride=logits_NVp.stride(0),
        rows=num_rows,
        first_column=first_column,
        columns=columns,
        width=width,
    )


def row_scales(maximum_N: Tensor, inverse_sum_N: Tensor, grad_N: Tensor) -> RowScales:
    """Return the rows' scales."""
    return RowScales(maximum_N.data_ptr(), inverse_sum_N.data_ptr(), grad_N.data_ptr())


def combined(
    logp_N: Tensor, entropy_N: Tensor | None, maximum_N: Tensor, inverse_sum_N: Tensor
) -> Combined:
    """Return where a combination of states is to be written, filled with NaN."""
    results = (logp_N, entropy_N, maximum_N, inverse_sum_N)
    for result in results:
        if result is not None:
            result.fill_(torch.nan)
    return Combined(*(None if result is None else result.data_ptr() for result in results))
