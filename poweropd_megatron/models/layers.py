"""Layers that Megatron's local spec lacks: norm, SDPA core attention, rotary per row.

Shapes: S positions, B sequences, Hq query heads and Hk key heads on this rank, D channels a head,
T tokens of a pack.
"""

import inspect
from itertools import groupby
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from poweropd_megatron.models.kv_cache import LayerCache
from poweropd_megatron.models.packed import packed_lengths

_VARLEN_HAS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Older releases of torch have variable lengths without grouped queries."""


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
    """Causal grouped-query attention over torch's SDPA, with packed sequences or a KV cache.

    Right-padded rows need no mask: no real position looks at a later one. Packed sequences need
    none either: each is attended to by itself, on recent GPUs in one variable-length kernel for the
    whole pack, elsewhere in one call for each run of sequences of equal length. No buffer grows
    with the square of the length where torch has a fused kernel: everywhere but for fp32 on GPUs.
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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **_kwargs: Any,
    ) -> Tensor:
        """Return the attended values.

        Shapes: query [S, B, Hq, D], key and value [S, B, Hk, D]; result [S, B, Hq * D]. Of a pack:
        query [T, Hq, D], key and value [T, Hk, D]; result [T, Hq * D].
        """
        if packed_seq_params is not None:
            return self._attend_packed(query, key, value, packed_seq_params).flatten(1)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask: Tensor | None = None
        if self.cache is not None:
            key, value, mask = self.cache.extend(key, value)
        if mask is None:
            attended = self._attend_causally(query, key, value)
        else:
            # One position a row: the query heads that share a key head can be positions of it
            # instead, for which no kernel has to repeat keys and values.
            grouped = query.reshape(key.shape[0], key.shape[1], -1, key.shape[3])
            attended = functional.scaled_dot_product_attention(
                grouped, key, value, attn_mask=mask, scale=self.softmax_scale
            ).reshape(query.shape)
        return attended.permute(2, 0, 1, 3).flatten(2)

    def _attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attended values, [B, Hq, S, D], of rows that are laid out alike."""
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        """Return the attended values of packed sequences, [T, Hq, D]."""
        if _has_varlen_kernel(query):
            boundaries = packed.cu_seqlens_q.to(query.device, non_blocking=True)
            longest = packed.max_seqlen_q
            attended_THD: Tensor = varlen_attn(  # type: ignore[assignment]
                query,
                key,
                value,
                boundaries,
                boundaries,
                longest,
                longest,
                scale=self.softmax_scale,
                window_size=(-1, 0),
                enable_gqa=query.shape[1] != key.shape[1],
            )
            return attended_THD
        runs = [(len(list(run)), length) for length, run in groupby(packed_lengths(packed))]
        tokens = [count * length for count, length in runs]
        parts = (torch.split(x, tokens) for x in (query, key, value))
        attended = []
        for run, *part in zip(runs, *parts, strict=True):
            query, key, value = (x.unflatten(0, run).transpose(1, 2) for x in part)
            attended.append(self._attend_causally(query, key, value).transpose(1, 2).flatten(0, 1))
        return torch.cat(attended)


def _has_varlen_kernel(query: Tensor) -> bool:
    """Return whether torch has flash attention of variable lengths for a query like this."""
    return (
        _VARLEN_HAS_GROUPS
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


class RowRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Rotary angles that differ between the rows of a decoding batch, or start anew in a pack."""

    positions_B: Tensor | None = None
    """While set: the position of the one token that each row holds."""

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int | tuple[int, ...]:
        """Return what GPTModel is to call forward with: a length, or those of packed sequences."""
        *others, packed_seq_params = args
        if packed_seq_params is not None:
            return tuple(packed_lengths(packed_seq_params))
        length: int = super().get_rotary_seq_len(*others, **kwargs)
        return length

    def forward(self, max_seq_len: int | tuple[int, ...], *args: Any, **kwargs: Any) -> Tensor:
        """Return the angles: [S, 1, 1, D], or [1, B, 1, D] while positions_B is set.

        Of a pack [T, 1, 1, D], which Megatron's rotary code takes as the angle of each token.
        """
        if isinstance(max_seq_len, tuple):
            whole: Tensor = super().forward(max(max_seq_len), *args, **kwargs)
            return torch.cat([whole[:length] for length in max_seq_len])
        if self.positions_B is None:
            angles: Tensor = super().forward(max_seq_len, *args, **kwargs)
            return angles
        inv_freq = self.inv_freq.to(self.positions_B.device)
        angles_BD = torch.outer(self.positions_B.to(inv_freq.dtype), inv_freq)
        return torch.cat([angles_BD, angles_BD], dim=-1)[None, :, None, :]
