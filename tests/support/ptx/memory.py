"""Memory that PTX sees: global memory with permissions, shared memory with a race detector."""

import ctypes
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.generic]


class PtxError(Exception):
    """What no GPU would have to accept, or what it would compute wrongly."""


class GlobalMemory:
    """Tensors' memory; an access has to lie within one of the stretches allowed for it."""

    def __init__(self) -> None:
        self._buffers: dict[int, Array] = {}
        self._allowed: dict[str, list[tuple[int, int]]] = {"read": [], "write": []}
        self._stretches: dict[str, NDArray[np.uint64]] = {}

    def allow(self, values: Tensor, *, read: bool = False, write: bool = False) -> None:
        """Allow accesses to a tensor, row by row where it has two dimensions."""
        if values.numel() == 0:
            return
        storage = values.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self._buffers:
            content = (ctypes.c_uint8 * storage.nbytes()).from_address(pointer)
            self._buffers[pointer] = np.frombuffer(content, np.uint8)
        rows = values if values.dim() == 2 else values.reshape(1, -1)
        row_bytes = rows.shape[1] * values.element_size()
        for kind in ["read"] * read + ["write"] * write:
            begins = [row.data_ptr() for row in rows]
            self._allowed[kind] += [(begin, begin + row_bytes) for begin in begins]
            self._stretches[kind] = np.array(sorted(self._allowed[kind]), np.uint64)

    def load(self, addresses: Array, dtype: np.dtype, count: int) -> Array:
        """Return [lanes, count] values."""
        view, index = self._locate("read", addresses, dtype, count)
        return view[index]

    def store(self, addresses: Array, values: Array) -> None:
        """Store [lanes, count] values."""
        view, index = self._locate("write", addresses, values.dtype, values.shape[1])
        view[index] = values

    def _locate(
        self, kind: str, addresses: Array, dtype: np.dtype, count: int
    ) -> tuple[Array, Array]:
        size = dtype.itemsize * count
        if (addresses % np.uint64(size)).any():
            raise PtxError(f"misaligned {kind} of {size} bytes")
        stretches = self._stretches.get(kind, np.zeros((0, 2), np.uint64))
        place = np.searchsorted(stretches[:, 0], addresses, side="right") - 1
        if (place < 0).any() or (addresses + np.uint64(size) > stretches[place, 1]).any():
            raise PtxError(f"{kind} outside of what the kernel may {kind}")
        pointers = np.array(sorted(self._buffers), np.uint64)
        found = np.unique(pointers[np.searchsorted(pointers, addresses, side="right") - 1])
        if len(found) > 1:
            raise NotImplementedError("one instruction accesses several tensors")
        offset = (addresses - found[0]).astype(np.int64) // dtype.itemsize
        buffer = self._buffers[int(found[0])]
        view = buffer[: len(buffer) // dtype.itemsize * dtype.itemsize].view(dtype)
        return view, offset[:, None] + np.arange(count)


class SharedMemory:
    """The shared variables of each block; a word may change hands only across a barrier."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self, num_blocks: int, variables: Iterable[range]) -> None:
        """Variables are ranges of addresses."""
        variables = list(variables)
        num_words = max((variable.stop for variable in variables), default=0) // 4
        self._exists = np.zeros(num_words, bool)
        for variable in variables:
            self._exists[variable.start // 4 : variable.stop // 4] = True
        self._words = np.full((num_blocks, num_words), 0xFFFFFFFF, np.uint32)
        self._writer = np.full(self._words.shape, self.NOBODY)
        self._reader = np.full(self._words.shape, self.NOBODY)

    def load(self, blocks: Array, threads: Array, addresses: Array) -> Array:
        """Return a 32-bit word for each lane."""
        where = blocks, self._index(addresses)
        writer = self._writer[where]
        if ((writer != self.NOBODY) & (writer != threads)).any():
            raise PtxError("shared-memory race: read of what another thread wrote")
        before = self._reader[where]
        self._reader[where] = threads
        alone = (self._reader[where] == threads) & ((before == self.NOBODY) | (before == threads))
        self._reader[blocks[~alone], where[1][~alone]] = self.SEVERAL
        return self._words[where]

    def store(self, blocks: Array, threads: Array, addresses: Array, values: Array) -> None:
        """Store a 32-bit word of each lane."""
        where = blocks, self._index(addresses)
        for user in (self._writer[where], self._reader[where]):
            if ((user != self.NOBODY) & (user != threads)).any():
                raise PtxError("shared-memory race: write to what another thread uses")
        self._writer[where] = threads
        if (self._writer[where] != threads).any():
            raise PtxError("shared-memory race: two threads write one word")
        self._words[where] = values

    def pass_barrier(self, blocks: Array) -> None:
        """Forget who used which word of some blocks."""
        self._writer[blocks] = self.NOBODY
        self._reader[blocks] = self.NOBODY

    def _index(self, addresses: Array) -> Array:
        index = addresses.astype(np.int64) // 4
        inside = (index >= 0) & (index < len(self._exists)) & (addresses % 4 == 0)
        if not inside.all() or not self._exists[index].all():
            raise PtxError("shared access out of bounds or misaligned")
        return index
