"""The keys and values of sequences that are being generated, each row at its own length.

Shapes: B rows, J rows that join, L positions of the longest, Hk key heads on this rank, D channels
a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

VISIBLE_MULTIPLE = 64
"""Positions by which a decoding step's view of the cache grows."""


class KVCache:
    """The cache of a rank's model chunks: a LayerCache per layer, and the length of each row.

    Prompts take rows (`admit`), get a token each per decoding step (`advance`), and give their row
    back for another prompt (`release`) or for good (`keep_rows`). What a decoding step reads and
    writes keeps its place in memory and its shape while `shape` stays the same: such a step can be
    recorded and replayed.
    """

    def __init__(self, num_layers: int, num_rows: int, device: torch.device) -> None:
        self.lengths_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """Tokens of each row in the cache, counting the ones that the running forward adds."""
        self.positions_B = torch.zeros_like(self.lengths_B)
        """Where each row's newest token is."""
        self.visible = 0
        """How many positions a decoding step looks at, masked beyond each row's length."""
        self.joining_J: Tensor | None = None
        """The rows that the running forward fills with prompts; None in a decoding step."""
        self._capacity = 0
        self._lengths = [0] * num_rows
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the rows, the positions that a decoding step looks at, and those in memory."""
        return len(self._lengths), self.visible, self._capacity

    def admit(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Let the next forward be of prompts of these lengths, for these rows."""
        self.joining_J = torch.tensor(rows, device=self.lengths_B.device)
        self._set_lengths(rows, lengths)

    def advance(self) -> None:
        """Let the next forward be of one more token on each row, at positions_B."""
        self.joining_J = None
        self.positions_B.copy_(self.lengths_B)
        self.lengths_B += 1
        self._lengths = [length + 1 for length in self._lengths]
        self._fit()

    def release(self, rows: Sequence[int]) -> None:
        """Forget what is in these rows; until a prompt takes them, they start anew."""
        self._set_lengths(rows, [0] * len(rows))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, so that the others cost nothing more."""
        kept = torch.tensor(rows, device=self.lengths_B.device)
        self.lengths_B, self.positions_B = self.lengths_B[kept], self.positions_B[kept]
        self._lengths = [self._lengths[row] for row in rows]
        self.visible = 0
        self._fit()
        for layer in self.layers:
            layer.keep_rows(kept)

    def _set_lengths(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        device = self.lengths_B.device
        at = torch.tensor(rows, device=device)
        self.lengths_B[at] = torch.tensor(lengths, device=device)
        self.positions_B[at] = self.lengths_B[at] - 1
        for row, length in zip(rows, lengths, strict=True):
            self._lengths[row] = length
        self._fit()

    def _fit(self) -> None:
        """Make the view as long as the longest row needs, and room for it, which doubles.

        The view shrinks where half of it does, and not before: a recorded step is lost by it.
        """
        needed = -(-max(self._lengths) // VISIBLE_MULTIPLE) * VISIBLE_MULTIPLE
        if needed > self.visible or 2 * needed <= self.visible:
            self.visible = needed
        if self.visible > self._capacity:
            self._capacity = max(self.visible, 2 * self._capacity)
            for layer in self.layers:
                layer.grow(self._capacity)


class LayerCache:
    """Keys and values of one layer, in memory from its first prompts on."""

    def __init__(self, owner: KVCache) -> None:
        self._owner = owner
        self._key_BHLD: Tensor | None = None
        self._value_BHLD: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store what a forward computed, and return the keys, values and mask for its queries.

        Shapes: key and value [J, Hk, S, D] of right-padded prompts that join, or [B, Hk, 1, D] of
        one token a row.
        Result: the prompts as given and no mask (causal), or [B, Hk, L, D] twice and a mask [B, 1,
        1, L].
        """
        owner = self._owner
        if self._key_BHLD is None or self._value_BHLD is None:
            num_rows, _, capacity = owner.shape
            shape = (num_rows, key.shape[1], capacity, key.shape[3])
            self._key_BHLD, self._value_BHLD = key.new_zeros(shape), value.new_zeros(shape)
        if owner.joining_J is not None:
            self._key_BHLD[owner.joining_J, :, : key.shape[2]] = key
            self._value_BHLD[owner.joining_J, :, : value.shape[2]] = value
            return key, value, None
        visible, positions_B = owner.visible, owner.positions_B
        rows = torch.arange(key.shape[0], device=key.device)
        self._key_BHLD[rows, :, positions_B] = key[:, :, 0]
        self._value_BHLD[rows, :, positions_B] = value[:, :, 0]
        mask_BL = torch.arange(visible, device=key.device) <= positions_B[:, None]
        return (
            self._key_BHLD[:, :, :visible],
            self._value_BHLD[:, :, :visible],
            mask_BL[:, None, None, :],
        )

    def grow(self, capacity: int) -> None:
        """Make room for this many positions."""
        if self._key_BHLD is not None and self._value_BHLD is not None:
            more = (0, 0, 0, capacity - self._key_BHLD.shape[2])
            self._key_BHLD = functional.pad(self._key_BHLD, more)
            self._value_BHLD = functional.pad(self._value_BHLD, more)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        if self._key_BHLD is not None and self._value_BHLD is not None:
            self._key_BHLD, self._value_BHLD = self._key_BHLD[rows], self._value_BHLD[rows]


@contextmanager
def attached(chunks: Sequence[Any], cache: KVCache) -> Iterator[None]:
    """Let the core attentions of a rank's model chunks use this cache inside the block."""
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    attentions = [
        (layer.self_attention.core_attention, layer_cache)
        for layer, layer_cache in zip(layers, cache.layers, strict=True)
    ]
    for attention, layer_cache in attentions:
        attention.cache = layer_cache
    try:
        yield
    finally:
        for attention, _ in attentions:
            attention.cache = None
