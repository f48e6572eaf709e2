"""Two-dimensional arrays inside files, read by rows into buffers of bytes.

Files are read, not mapped: pages of a mapped file count as the process's memory.
Shapes: R rows, B bytes of a row. A tensor of one dimension has rows of one element.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families.weight import Weight

Buffer = npt.NDArray[np.uint8]
PIECE_BYTES = 2**19
"""What is held in memory at once: little enough to stay in a core's cache on its way."""


class Array(Protocol):
    """Something that rows can be read from."""

    @property
    def num_rows(self) -> int:
        """Return how many rows there are."""
        ...

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        ...

    def read(self, first_row: int, out_RB: Buffer) -> None:
        """Fill a contiguous buffer with len(out_RB) rows from first_row. Raises: InputError."""
        ...


class Files:
    """Files opened for reading as they are needed, at most MAX_OPEN at once."""

    MAX_OPEN = 64

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, out: Buffer) -> None:
        """Fill a contiguous buffer from a place in a file.

        Raises: InputError if the file can't be read, or ends before.
        """
        view = memoryview(out).cast("B")
        try:
            descriptor = self._descriptor(path)
            while view:
                count = os.preadv(descriptor, [view], offset)
                if not count:
                    raise InputError(f"{self.setting}: {path} ends at byte {offset}, too early")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise InputError(f"{self.setting}: {path} can't be read: {error}") from None

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) == self.MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(path)
        return self._open[path]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


@dataclass(frozen=True)
class FileBlock:
    """Consecutive rows in a file."""

    files: Files
    path: Path
    offset: int
    num_rows: int
    row_bytes: int

    def read(self, first_row: int, out_RB: Buffer) -> None:
        """Fill the buffer with rows from first_row. Raises: InputError."""
        self.files.read(self.path, self.offset + first_row * self.row_bytes, out_RB)


@dataclass(frozen=True)
class Tile:
    """An array that lies in a larger one, at a row and at a byte of the rows."""

    first_row: int
    first_byte: int
    array: Array


@dataclass(frozen=True)
class Tiled:
    """An array cut into tiles, in rows and columns, without gaps."""

    tiles: Sequence[Tile]
    num_rows: int
    row_bytes: int

    def read(self, first_row: int, out_RB: Buffer) -> None:
        """Fill the buffer with rows from first_row. Raises: InputError."""
        for tile in self.tiles:
            start = max(first_row, tile.first_row)
            stop = min(first_row + len(out_RB), tile.first_row + tile.array.num_rows)
            if start >= stop:
                continue
            rows = out_RB[start - first_row : stop - first_row]
            if tile.array.row_bytes == self.row_bytes:
                tile.array.read(start - tile.first_row, rows)
                continue
            part = np.empty((stop - start, tile.array.row_bytes), np.uint8)
            tile.array.read(start - tile.first_row, part)
            rows[:, tile.first_byte : tile.first_byte + tile.array.row_bytes] = part


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one of several arrays."""

    source: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class Rearranged:
    """Rows of several arrays in another order."""

    sources: Sequence[Array]
    runs: Sequence[Run]
    num_rows: int
    row_bytes: int

    def read(self, first_row: int, out_RB: Buffer) -> None:
        """Fill the buffer with rows from first_row. Raises: InputError."""
        row = 0
        for run in self.runs:
            start = max(first_row, row)
            stop = min(first_row + len(out_RB), row + run.num_rows)
            if start < stop:
                self.sources[run.source].read(
                    run.first_row + start - row, out_RB[start - first_row : stop - first_row]
                )
            row += run.num_rows


def read_pieces(array: Array, buffer: Buffer, rows: range) -> Iterator[Buffer]:
    """Yield rows in pieces that fit into the buffer, which the next piece overwrites.

    Raises: InputError.
    """
    rows_at_once = max(1, buffer.nbytes // array.row_bytes)
    for first_row in range(rows.start, rows.stop, rows_at_once):
        num_rows = min(rows_at_once, rows.stop - first_row)
        num_bytes = num_rows * array.row_bytes
        flat = buffer[:num_bytes] if num_bytes <= buffer.nbytes else np.empty(num_bytes, np.uint8)
        piece_RB = flat.reshape(num_rows, array.row_bytes)
        array.read(first_row, piece_RB)
        yield piece_RB


def merged_runs(weight: Weight) -> list[Run]:
    """Return where the rows of a merged parameter come from, in order.

    A family's merge only moves whole rows, so it is applied to their numbers once, and the rows
    are then read from where they are.
    """
    sizes = [shape[0] for shape in weight.shapes]
    starts = np.cumsum([0, *sizes])
    numbers = [
        torch.arange(start, start + size).reshape(size, *[1] * (len(shape) - 1))
        for start, size, shape in zip(starts, sizes, weight.shapes, strict=False)
    ]
    order = weight.merge(numbers).flatten().numpy()
    assert np.array_equal(np.sort(order), np.arange(starts[-1])), weight.megatron
    is_start = np.isin(order, starts[:-1])
    breaks = np.flatnonzero((np.diff(order, prepend=-2) != 1) | is_start)
    ends = [*breaks[1:], len(order)]
    sources = np.searchsorted(starts, order[breaks], side="right") - 1
    return [
        Run(int(source), int(order[begin] - starts[source]), int(end - begin))
        for source, begin, end in zip(sources, breaks, ends, strict=True)
    ]


def split_runs(runs: Sequence[Run], source: int) -> list[Run]:
    """Return where the rows of one of the merged tensors lie in the merged parameter, in order."""
    found, row = [], 0
    for run in runs:
        if run.source == source:
            found.append((run.first_row, Run(0, row, run.num_rows)))
        row += run.num_rows
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def cast_bytes(piece: Buffer, source: torch.dtype, target: torch.dtype) -> Buffer:
    """Return the bytes of the elements in another dtype; the same bytes if it is the same."""
    if source == target:
        return piece
    elements = torch.from_numpy(piece.reshape(-1)).view(source).to(target)
    return elements.view(torch.uint8).numpy()
