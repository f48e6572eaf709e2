"""Layers that Megatron's local spec lacks: norm, SDPA core attention, rotary per row.

Shapes: S positions, B sequences, Hq query heads and Hk key heads on this rank, D channels a head.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from poweropd_megatron.models.kv_cache import LayerCache


class RMSNorm(torch.nn.Module):
    """RMSNorm as Qwen3 has it: normalise in fp32, round, then scale.

    Megatron's torch norm refuses sequence parallelism; this one marks its weight for the gradient
    reduction.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return x / rms(x) * weight, in x's dtype."""
        normalised = functional.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return normalised.to(x.dtype) * self.weight


class SDPACoreAttention(torch.nn.Module):
    """Causal grouped-query attention over torch's SDPA, with an optional KV cache.

    Right-padded rows need no mask: no real position looks at a later one.
    """

    cache: LayerCache | None
    """While set, keys and values are kept in it, and single-position queries read from it."""

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.config = config
        self.softmax_scale = softmax_scale
        self.cache = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any
    ) -> Tensor:
        """Return the attended values.

        Shapes: query [S, B, Hq, D], key and value [S, B, Hk, D]; result [S, B, Hq * D].
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask: Tensor | None = None
        if self.cache is not None:
            key, value, mask = self.cache.extend(key, value)
        if mask is None:
            attended = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        else:
            # One position a row: the query heads that share a key head can be positions of it
            # instead, for which no kernel has to repeat keys and values.
            grouped = query.reshape(key.shape[0], key.shape[1], -1, key.shape[3])
            attended = functional.scaled_dot_product_attention(
                grouped, key, value, attn_mask=mask, scale=self.softmax_scale
            ).reshape(query.shape)
        return attended.permute(2, 0, 1, 3).flatten(2)


class RowRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Rotary angles that differ between the rows of a decoding batch."""

    positions_B: Tensor | None = None
    """While set: the position of the one token that each row holds."""

    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> Tensor:
        """Return the angles: [S, 1, 1, D], or [1, B, 1, D] while positions_B is set."""
        if self.positions_B is None:
            angles: Tensor = super().forward(max_seq_len, *args, **kwargs)
            return angles
        inv_freq = self.inv_freq.to(self.positions_B.device)
        angles_BD = torch.outer(self.positions_B.to(inv_freq.dtype), inv_freq)
        return torch.cat([angles_BD, angles_BD], dim=-1)[None, :, None, :]
