"""What the operations refuse: always a ValueError that names the tensor and what was expected."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from poweropd_megatron.ops.rows import combine, row_grad_, row_stats

ROWS, COLUMNS = 3, 5


def rows(**changes: Any) -> dict[str, Any]:
    """Return good arguments of row_stats, but for the changes."""
    good = {
        "logits_NVp": torch.zeros(ROWS, COLUMNS),
        "targets_N": torch.tensor([0, 4, -100]),
        "first_column": 0,
        "vocab_size": COLUMNS,
    }
    return good | changes


def scales(**changes: Any) -> dict[str, Any]:
    """Return good arguments of row_grad_, but for the changes."""
    names = ("maximum_N", "inverse_sum_N", "grad_N")
    return rows(**{name: torch.ones(ROWS) for name in names} | changes)


def refused(call: Callable[..., Any], arguments: dict[str, Any], *parts: str) -> None:
    """Assert that the call raises ValueError with a message that has these parts, in order."""
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts))):
        call(**arguments)


BAD_ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "fp16": (
        {"logits_NVp": torch.zeros(ROWS, COLUMNS, dtype=torch.float16)},
        ("logits_NVp must be fp32 or bf16, got torch.float16",),
    ),
    "fp64": (
        {"logits_NVp": torch.zeros(ROWS, COLUMNS, dtype=torch.float64)},
        ("logits_NVp must be fp32 or bf16, got torch.float64",),
    ),
    "int": (
        {"logits_NVp": torch.zeros(ROWS, COLUMNS, dtype=torch.int32)},
        ("logits_NVp must be fp32 or bf16, got torch.int32",),
    ),
    "a vector": ({"logits_NVp": torch.zeros(ROWS)}, ("logits_NVp must be [N, Vp], got (3,)",)),
    "a number": ({"logits_NVp": torch.zeros(())}, ("logits_NVp must be [N, Vp], got ()",)),
    "strided columns": (
        {"logits_NVp": torch.zeros(ROWS, 2 * COLUMNS)[:, ::2]},
        ("logits_NVp must have stride 1 along the columns, got 2: call .contiguous() first",),
    ),
    "negated": (
        {"logits_NVp": torch._neg_view(torch.zeros(ROWS, COLUMNS))},
        ("logits_NVp is a lazily negated view: call .resolve_neg() first",),
    ),
    "transposed": (
        {"logits_NVp": torch.zeros(COLUMNS, ROWS).t()},
        ("logits_NVp must have stride 1 along the columns, got 3",),
    ),
    "broadcast columns": (
        {"logits_NVp": torch.zeros(ROWS, 1).expand(ROWS, COLUMNS)},
        ("logits_NVp must have stride 1 along the columns, got 0",),
    ),
    "other rows": (
        {"logits_NVp": torch.zeros(ROWS + 1, COLUMNS)},
        ("targets_N must be [4] int64, got (3,) torch.int64",),
    ),
    "logits elsewhere": (
        {"logits_NVp": torch.zeros(ROWS, COLUMNS, device="meta")},
        ("targets_N is on cpu, expected meta",),
    ),
    "targets elsewhere": (
        {"targets_N": torch.zeros(ROWS, dtype=torch.int64, device="meta")},
        ("targets_N is on meta, expected cpu",),
    ),
    "all elsewhere": (
        {
            "logits_NVp": torch.zeros(ROWS, COLUMNS, device="meta"),
            "targets_N": torch.zeros(ROWS, dtype=torch.int64, device="meta"),
        },
        ("targets_N is on meta, expected a device with memory",),
    ),
    "int32 targets": (
        {"targets_N": torch.zeros(ROWS, dtype=torch.int32)},
        ("targets_N must be [3] int64, got (3,) torch.int32",),
    ),
    "a target for all": (
        {"targets_N": torch.tensor(1)},
        ("targets_N must be [3] int64, got () torch.int64",),
    ),
    "target beyond": (
        {"targets_N": torch.tensor([0, 5, 0])},
        ("targets_N must lie in [0, 5) or be -100, got 5 in row 1",),
    ),
    "target below": (
        {"targets_N": torch.tensor([0, 1, -1])},
        ("targets_N must lie in [0, 5) or be -100, got -1 in row 2",),
    ),
    "sparse": (
        {"logits_NVp": torch.zeros(ROWS, COLUMNS).to_sparse()},
        ("logits_NVp must be a dense strided tensor, got torch.sparse_coo",),
    ),
    "nested": (
        {"logits_NVp": torch.nested.nested_tensor([torch.zeros(COLUMNS)] * ROWS)},
        ("logits_NVp must be a dense strided tensor, got a nested tensor",),
    ),
    "an array": (
        {"logits_NVp": torch.zeros(ROWS, COLUMNS).numpy()},
        ("logits_NVp must be a dense strided tensor, got ndarray",),
    ),
    "nothing": (
        {"logits_NVp": None},
        ("logits_NVp must be a dense strided tensor, got NoneType",),
    ),
    "a list of targets": (
        {"targets_N": [0, 4, -100]},
        ("targets_N must be a dense strided tensor, got list",),
    ),
    "sparse targets": (
        {"targets_N": torch.tensor([0, 4, -100]).to_sparse()},
        ("targets_N must be a dense strided tensor, got torch.sparse_coo",),
    ),
    "negated targets": (
        {"targets_N": torch._neg_view(torch.tensor([0, -4, 100]))},
        ("targets_N is a lazily negated view: call .resolve_neg() first",),
    ),
    "half a column": ({"first_column": 0.5}, ("first_column must be an integer, got 0.5",)),
    "a far column": (
        {"first_column": 2**63},
        ("first_column must be <= 2147483647, got 9223372036854775808",),
    ),
    "half a token": ({"vocab_size": 4.5}, ("vocab_size must be an integer, got 4.5",)),
    "a truth": ({"vocab_size": True}, ("vocab_size must be an integer, got True",)),
    "a tensor of tokens": (
        {"vocab_size": torch.tensor(5)},
        ("vocab_size must be an integer, got tensor(5)",),
    ),
    "too many tokens": (
        {"vocab_size": 2**70},
        ("vocab_size must be <= 2147483647, got 1180591620717411303424",),
    ),
    "negative column": ({"first_column": -1}, ("first_column must be >= 0, got -1",)),
    "no vocabulary": ({"vocab_size": 0}, ("vocab_size must be >= 1, got 0",)),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_do_not_fit_are_refused(name: str) -> None:
    changes, parts = BAD_ROWS[name]
    refused(row_stats, rows(**changes), *parts)
    refused(row_grad_, scales(**changes), *parts)


BAD_FP32: dict[str, tuple[Tensor, str]] = {
    "bf16": (torch.ones(ROWS, dtype=torch.bfloat16), "must be [3] fp32, got (3,) torch.bfloat16"),
    "fp64": (torch.ones(ROWS, dtype=torch.float64), "must be [3] fp32, got (3,) torch.float64"),
    "int": (torch.ones(ROWS, dtype=torch.int64), "must be [3] fp32, got (3,) torch.int64"),
    "one for all": (torch.ones(()), "must be [3] fp32, got () torch.float32"),
    "a column": (torch.ones(ROWS, 1), "must be [3] fp32, got (3, 1) torch.float32"),
    "too few": (torch.ones(ROWS - 1), "must be [3] fp32, got (2,) torch.float32"),
    "elsewhere": (torch.ones(ROWS, device="meta"), "is on meta, expected cpu"),
    "strided": (torch.ones(2 * ROWS)[::2], "must be contiguous, got strides (2,)"),
    "broadcast": (torch.ones(1).expand(ROWS), "must be contiguous, got strides (0,)"),
    "negated": (torch._neg_view(torch.ones(ROWS)), "is a lazily negated view"),
    "sparse": (torch.ones(ROWS).to_sparse(), "must be a dense strided tensor, got torch.sparse"),
}


@pytest.mark.parametrize("name", ["maximum_N", "inverse_sum_N", "grad_N"])
@pytest.mark.parametrize("bad", BAD_FP32)
def test_scales_that_do_not_fit_are_refused(bad: str, name: str) -> None:
    value, message = BAD_FP32[bad]
    refused(row_grad_, scales(**{name: value}), f"{name} {message}")


@pytest.mark.parametrize(
    "logits_NVp",
    [
        torch.zeros(1, COLUMNS).expand(ROWS, COLUMNS),
        torch.zeros(20).as_strided((ROWS, COLUMNS), (COLUMNS - 1, 1)),
    ],
)
def test_rows_that_overlap_are_read_but_not_written(logits_NVp: Tensor) -> None:
    row_stats(**rows(logits_NVp=logits_NVp))
    stride = logits_NVp.stride(0)
    message = f"logits_NVp: rows of 5 columns with stride {stride} overlap and can't be written"
    refused(row_grad_, scales(logits_NVp=logits_NVp), message)


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        (torch.zeros(ROWS, 3), "stats_N4 must be [3, 4] fp32, got (3, 3)"),
        (torch.zeros(ROWS + 1, 4), "stats_N4 must be [3, 4] fp32, got (4, 4)"),
        (torch.zeros(ROWS, 4).double(), "stats_N4 must be [3, 4] fp32, got (3, 4) torch.float64"),
        (torch.zeros(4, ROWS).t(), "stats_N4 must be contiguous, got strides (1, 3)"),
        (torch.zeros(ROWS, 4, device="meta"), "stats_N4 is on meta, expected cpu"),
        (torch.zeros(13)[1:].view(ROWS, 4), "stats_N4 must start at a multiple of 16 bytes"),
        (torch._neg_view(torch.zeros(ROWS, 4)), "stats_N4 is a lazily negated view"),
        (torch.zeros(ROWS, 4, requires_grad=True), "stats_N4 is a leaf that requires grad"),
    ],
)
def test_states_that_do_not_fit_are_refused(stats: Tensor, message: str) -> None:
    refused(row_stats, rows(stats_N4=stats), message)


@pytest.mark.parametrize(
    ("stats", "targets", "message"),
    [
        (torch.zeros(ROWS, 4), torch.zeros(ROWS).long(), "stats_RN4 must be [R, N, 4] with R >= 1"),
        (torch.zeros(0, ROWS, 4), torch.zeros(ROWS).long(), "R >= 1, got (0, 3, 4)"),
        (torch.zeros(2, ROWS, 3), torch.zeros(ROWS).long(), "stats_RN4 must be [2, 3, 4] fp32"),
        (torch.zeros(2, ROWS, 4).half(), torch.zeros(ROWS).long(), "got (2, 3, 4) torch.float16"),
        (torch.zeros(2, 4, ROWS).mT, torch.zeros(ROWS).long(), "stats_RN4 must be contiguous"),
        (torch.zeros(2, ROWS, 4), torch.zeros(2).long(), "targets_N must be [3] int64, got (2,)"),
        (torch.zeros(2, ROWS, 4), torch.tensor(0), "targets_N must be [3] int64, got ()"),
        (torch.zeros(2, ROWS, 4), torch.zeros(ROWS), "targets_N must be [3] int64, got (3,) torch"),
        (
            torch.zeros(2, ROWS, 4),
            torch.zeros(ROWS, device="meta").long(),
            "targets_N is on meta, expected cpu",
        ),
        (
            torch.zeros(2, ROWS, 4),
            torch.tensor([0, -7, -100]),
            "targets_N must be >= 0 or be -100, got -7 in row 1",
        ),
        (
            torch._neg_view(torch.zeros(2, ROWS, 4)),
            torch.zeros(ROWS).long(),
            "stats_RN4 is a lazily negated view",
        ),
    ],
)
def test_states_that_do_not_combine_are_refused(
    stats: Tensor, targets: Tensor, message: str
) -> None:
    refused(combine, {"stats_RN4": stats, "targets_N": targets}, message)
