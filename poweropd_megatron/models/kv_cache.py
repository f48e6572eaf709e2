"""The keys and values of sequences that are being generated, each row at its own length.

Shapes: B sequences, L positions of the longest, Hk key heads on this rank, D channels a head.
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

    What a decoding step reads and writes keeps its place in memory, and its shape while `visible`
    and the rows stay the same: such a step can be recorded and replayed.
    """

    def __init__(self, num_layers: int, prompt_lengths_B: Tensor) -> None:
        self.lengths_B = prompt_lengths_B.clone()
        """Tokens of each row in the cache, counting the ones that the running forward adds."""
        self.positions_B = prompt_lengths_B - 1
        """Where each row's newest token is."""
        self._longest = int(prompt_lengths_B.max())
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    @property
    def visible(self) -> int:
        """Return how many positions a decoding step looks at, masked beyond each row's length."""
        return -(-self._longest // VISIBLE_MULTIPLE) * VISIBLE_MULTIPLE

    def advance(self) -> None:
        """Make room for one more token on each row, at positions_B."""
        self.positions_B.copy_(self.lengths_B)
        self.lengths_B += 1
        self._longest += 1
        for layer in self.layers:
            layer.reserve(self.visible)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these, so that finished sequences cost nothing more."""
        self.lengths_B, self.positions_B = self.lengths_B[rows], self.positions_B[rows]
        self._longest = int(self.lengths_B.max())
        for layer in self.layers:
            layer.keep_rows(rows)


class LayerCache:
    """Keys and values of one layer; grown by doubling, so rarely copied."""

    def __init__(self, owner: KVCache) -> None:
        self._owner = owner
        self._key_BHLD: Tensor | None = None
        self._value_BHLD: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store what a forward computed, and return the keys, values and mask for its queries.

        Shapes: key and value [B, Hk, S, D]: the right-padded prompts at first, one token a row
        afterwards.
        Result: the prompts as given and no mask (causal), or [B, Hk, L, D] twice and a mask [B, 1,
        1, L].
        """
        if self._key_BHLD is None or self._value_BHLD is None:
            self._key_BHLD, self._value_BHLD = key.contiguous(), value.contiguous()
            return key, value, None
        visible, positions_B = self._owner.visible, self._owner.positions_B
        rows = torch.arange(key.shape[0], device=key.device)
        self._key_BHLD[rows, :, positions_B] = key[:, :, 0]
        self._value_BHLD[rows, :, positions_B] = value[:, :, 0]
        mask_BL = torch.arange(visible, device=key.device) <= positions_B[:, None]
        return (
            self._key_BHLD[:, :, :visible],
            self._value_BHLD[:, :, :visible],
            mask_BL[:, None, None, :],
        )

    def reserve(self, length: int) -> None:
        """Make room for so many positions, or twice as many as there are."""
        if self._key_BHLD is not None and self._value_BHLD is not None:
            self._key_BHLD = _grown(self._key_BHLD, length)
            self._value_BHLD = _grown(self._value_BHLD, length)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        if self._key_BHLD is not None and self._value_BHLD is not None:
            self._key_BHLD, self._value_BHLD = self._key_BHLD[rows], self._value_BHLD[rows]


def _grown(cache_BHLD: Tensor, length: int) -> Tensor:
    capacity = cache_BHLD.shape[2]
    if length <= capacity:
        return cache_BHLD
    return functional.pad(cache_BHLD, (0, 0, 0, max(length, 2 * capacity) - capacity))


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
