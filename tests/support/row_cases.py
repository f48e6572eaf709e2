"""The rows of logits that every back-end of the row operations is tried on.

Shapes: N tokens (rows), V vocabulary, Vp columns of a shard (padding included).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100
GUARD = 64
"""Elements around the rows that have to stay as they are."""


ROW_KINDS = (
    "plain",
    "high",
    "low",
    "wide",
    "flat",
    "ignored",
    "unrewarded",
    "certain",
    "impossible target",
    "first half impossible",
    "first half masked",
    "masked but for the target",
    "nothing possible",
    "nan",
    "nan alone",
    "nan alone in its shard",
    "infinity",
    "last target",
)


def _shape_row(row_V: Tensor, kind: str, *, target: int, number: int) -> None:
    """Make a row of normal logits the `number`-th of a case, of one of ROW_KINDS."""
    size = len(row_V)
    match kind:
        case "high":
            row_V += 1000
        case "low":
            row_V -= 1000
        case "wide":
            row_V *= 20
        case "flat":
            row_V.zero_()
        case "ignored":
            row_V.fill_(math.nan)
        case "certain":
            row_V[torch.arange(size) != target] = -math.inf
        case "impossible target":
            row_V[target] = -math.inf
        case "first half impossible":
            row_V[: size // 2] = -math.inf
        case "first half masked":
            row_V[: size // 2] = -3e38
        case "masked but for the target":
            row_V[torch.arange(size) != target] = -3e38
        case "nothing possible":
            row_V.fill_(-math.inf)
        case "nan":
            row_V[number % size] = math.nan
        case "nan alone":
            row_V.fill_(-math.inf)
            row_V[number % size] = math.nan
        case "nan alone in its shard":
            row_V[7 * size // 8 :] = -math.inf
            row_V[-1] = math.nan
        case "infinity":
            row_V[number % size] = math.inf


@dataclass(frozen=True, kw_only=True)
class Case:
    """Some rows over a vocabulary, and how they lie in memory."""

    vocab_size: int
    dtype: torch.dtype = torch.float32
    tp_size: int = 1
    """Shards of ceil(padded_size / tp_size) columns."""
    padded_size: int = 0
    """Size of the vocabulary with its padding; vocab_size where that is more."""
    padding: float = math.nan
    gap: int = 0
    """Elements between the rows."""
    offset: int = 0
    """Elements between a 64-byte boundary and the first row."""
    tiles: int = 1
    """Visits that each shard's columns are cut into for the accumulated stats."""
    kinds: tuple[str, ...] = ROW_KINDS
    large: bool = False
    """Whether it is too much for what interprets the kernels."""

    @property
    def shard_width(self) -> int:
        return -(-max(self.vocab_size, self.padded_size) // self.tp_size)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows before they are cut into shards; grad_N is what arrives at the log-probs."""

    logits_NV: Tensor
    targets_N: Tensor
    grad_N: Tensor


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A rank's columns, and the memory between and around its rows."""

    logits_NVp: Tensor
    first_column: int
    columns: int
    guards: tuple[Tensor, ...]


def make_rows(case: Case) -> Rows:
    """Return the case's rows in its dtype, a row for each of its kinds."""
    generator = torch.Generator().manual_seed(case.vocab_size)
    size, num_rows = case.vocab_size, len(case.kinds)
    logits_NV = 4 * torch.randn(num_rows, size, generator=generator)
    targets_N = torch.randint(size, (num_rows,), generator=generator)
    grad_N = torch.randn(num_rows, generator=generator)
    for number, kind in enumerate(case.kinds):
        if kind in ("first half impossible", "last target"):
            targets_N[number] = size - 1
        elif kind in ("nan", "nan alone in its shard"):
            targets_N[number] = (number + 1) % size
        target = int(targets_N[number])
        logits_NV[number, target] += 24 * torch.rand((), generator=generator) - 6
        _shape_row(logits_NV[number], kind, target=target, number=number)
        if kind == "ignored":
            targets_N[number] = IGNORED
        if kind in ("ignored", "unrewarded"):
            grad_N[number] = 0
    return Rows(logits_NV=logits_NV.to(case.dtype), targets_N=targets_N, grad_N=grad_N)


def cut(case: Case, logits_NV: Tensor, device: str = "cpu") -> list[Shard]:
    """Return the shards of the rows, with padding and guards that would show if they were read."""
    width = case.shard_width
    return [
        _lay_out(case, logits_NV[:, first : first + width].to(device), first_column=first)
        for first in range(0, case.tp_size * width, width)
    ]


def _lay_out(case: Case, part_NV: Tensor, *, first_column: int) -> Shard:
    num_rows, columns = part_NV.shape
    width, stride = case.shard_width, case.shard_width + case.gap
    begin = GUARD + case.offset
    size = begin + max(num_rows - 1, 0) * stride + width + GUARD
    buffer = torch.empty(size, dtype=case.dtype, device=part_NV.device)
    between = torch.as_strided(
        buffer, (max(num_rows - 1, 0), min(case.gap, GUARD)), (stride, 1), begin + width
    )
    guards = (buffer[:begin], between, buffer[size - GUARD :])
    for guard in guards:
        guard.fill_(math.nan)
    logits_NVp = torch.as_strided(buffer, (num_rows, width), (stride, 1), begin)
    logits_NVp[:, :columns] = part_NV
    logits_NVp[:, columns:] = case.padding
    return Shard(logits_NVp=logits_NVp, first_column=first_column, columns=columns, guards=guards)


def _both_dtypes(name: str, case: Case) -> dict[str, Case]:
    return {
        f"{name}-fp32": replace(case, dtype=torch.float32),
        f"{name}-bf16": replace(case, dtype=torch.bfloat16),
    }


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for size in (1, 7, 8, 9, 255, 256, 257, 1003, 4099, 18992):
        cases |= _both_dtypes(f"V{size}", Case(vocab_size=size))
    for tp_size in (2, 4, 8):
        cases |= _both_dtypes(f"TP{tp_size}", Case(vocab_size=1003, tp_size=tp_size, tiles=2))
    for offset in range(1, 8):
        cases |= _both_dtypes(f"offset-{offset}", Case(vocab_size=300, offset=offset))
    cases |= _both_dtypes("odd-stride", Case(vocab_size=517, offset=1, gap=5))
    cases |= _both_dtypes("even-stride", Case(vocab_size=520, gap=16))
    cases |= _both_dtypes("tiles", Case(vocab_size=4099, tiles=3, gap=1))
    cases |= _both_dtypes("padded", Case(vocab_size=1000, padded_size=1101))
    cases |= _both_dtypes("padded-TP4", Case(vocab_size=37, tp_size=4, padded_size=48, tiles=4))
    cases |= _both_dtypes(
        "infinite-padding", Case(vocab_size=4000, tp_size=4, padded_size=4352, padding=math.inf)
    )
    cases |= _both_dtypes("empty-shards", Case(vocab_size=5, tp_size=4, padded_size=64, gap=3))
    cases |= _both_dtypes("fewer-columns-than-ranks", Case(vocab_size=3, tp_size=8))
    cases |= _both_dtypes("nan-in-each-column", Case(vocab_size=83, kinds=("nan",) * 83, offset=3))
    cases |= _both_dtypes("no-rows", Case(vocab_size=256, kinds=()))
    cases |= _both_dtypes(
        "far-rows", Case(vocab_size=50, gap=2**31, kinds=("plain", "high"), offset=2)
    )
    cases["many-rows"] = Case(vocab_size=7, tp_size=2, kinds=17 * ROW_KINDS)
    wide = Case(vocab_size=70001, tiles=2, offset=3, kinds=ROW_KINDS[:6:2])
    cases |= _both_dtypes("wide", wide)
    for tp_size in (1, 8):
        cases |= _both_dtypes(
            f"qwen3-TP{tp_size}", Case(vocab_size=151936, tp_size=tp_size, tiles=2, large=True)
        )
    return cases


CASES = _cases()
