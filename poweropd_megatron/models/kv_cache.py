"""The keys and values of sequences that are being generated, each row at its own length.

Shapes: B sequences, L positions of the longest, Hk key heads on this rank, D channels a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """The cache of one model chunk: a LayerCache per layer, and the length of each row."""

    def __init__(self, num_layers: int, prompt_lengths_B: Tensor) -> None:
        self.lengths_B = prompt_lengths_B
        """Tokens of each row in the cache, counting the ones that the running forward adds."""
        self.longest = int(prompt_lengths_B.max())
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    def advance(self) -> Tensor:
        """Make room for one more token on each row, and return its position, [B]."""
        positions_B = self.lengths_B
        self.lengths_B = positions_B + 1
        self.longest += 1
        return positions_B

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these, so that finished sequences cost nothing more."""
        self.lengths_B = self.lengths_B[rows]
        self.longest = int(self.lengths_B.max())
        for layer in self.layers:
            layer.keep_rows(rows)


class LayerCache:
    """Keys and values of one layer; grown by doubling, so never far larger than needed."""

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
        longest, lengths_B = self._owner.longest, self._owner.lengths_B
        if longest > self._key_BHLD.shape[2]:
            self._key_BHLD, self._value_BHLD = _grow(self._key_BHLD), _grow(self._value_BHLD)
        rows = torch.arange(key.shape[0], device=key.device)
        self._key_BHLD[rows, :, lengths_B - 1] = key[:, :, 0]
        self._value_BHLD[rows, :, lengths_B - 1] = value[:, :, 0]
        mask_BL = torch.arange(longest, device=key.device) < lengths_B[:, None]
        return (
            self._key_BHLD[:, :, :longest],
            self._value_BHLD[:, :, :longest],
            mask_BL[:, None, None, :],
        )

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        if self._key_BHLD is not None and self._value_BHLD is not None:
            self._key_BHLD, self._value_BHLD = self._key_BHLD[rows], self._value_BHLD[rows]


def _grow(cache_BHLD: Tensor) -> Tensor:
    return torch.cat([cache_BHLD, torch.zeros_like(cache_BHLD)], dim=2)


@contextmanager
def attached(chunks: Sequence[Any], caches: Sequence[KVCache]) -> Iterator[None]:
    """Let the core attentions of model chunks use these caches inside the block."""
    attentions = [
        (layer.self_attention.core_attention, layer_cache)
        for chunk, cache in zip(chunks, caches, strict=True)
        for layer, layer_cache in zip(chunk.decoder.layers, cache.layers, strict=True)
    ]
    for attention, layer_cache in attentions:
        attention.cache = layer_cache
    try:
        yield
    finally:
        for attention, _ in attentions:
            attention.cache = None
