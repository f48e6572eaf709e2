"""Layers that Megatron's local spec lacks: norm, SDPA core attention, rotary per row.

Shapes: S positions, B sequences, Hq query heads and Hk key heads on this rank, D channels a head,
T tokens of a pack. Under context parallelism S and T are those of this rank's slices.
"""

from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from poweropd_megatron.models.attention_kernels import (
    attend_causally,
    attend_varlen,
    has_varlen_kernel,
)
from poweropd_megatron.models.context_parallel import attend_sliced, own_positions
from poweropd_megatron.models.kv_cache import LayerCache
from poweropd_megatron.models.packed import packed_lengths


class RMSNorm(torch.nn.Module):
    """RMSNorm as transformers computes it: normalise in fp32, round, then scale.

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
    Of sequences that context parallelism has cut, see attend_sliced.
    """

    cache: LayerCache | None
    """While set, keys and values are kept in it, and single-position queries read from it."""
    is_sliced: bool
    """Whether context parallelism, if there is any, has cut the sequences: see whole_sequences."""

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.softmax_scale = softmax_scale
        self.cache = None
        self.is_sliced = True
        self._cp_group: dist.ProcessGroup | None = None
        if pg_collection is not None and dist.get_world_size(pg_collection.cp) > 1:
            self._cp_group = pg_collection.cp

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
        if self._cp_group is not None and self.is_sliced:
            return self._attend_sliced(query, key, value, packed_seq_params, self._cp_group)
        if packed_seq_params is not None:
            return self._attend_packed(query, key, value, packed_seq_params).flatten(1)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask: Tensor | None = None
        if self.cache is not None:
            key, value, mask = self.cache.extend(key, value)
        if mask is None:
            attended = attend_causally(query, key, value, scale=self.softmax_scale)
        else:
            # One position a row: the query heads that share a key head can be positions of it
            # instead, for which no kernel has to repeat keys and values.
            grouped = query.reshape(key.shape[0], key.shape[1], -1, key.shape[3])
            attended = functional.scaled_dot_product_attention(
                grouped, key, value, attn_mask=mask, scale=self.softmax_scale
            ).reshape(query.shape)
        return attended.permute(2, 0, 1, 3).flatten(2)

    def _attend_sliced(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed: PackedSeqParams | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """Return the attended values of this rank's slices; rows are a pack of equal lengths."""
        shape = query.shape[:-2]
        if packed is None:
            query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
            lengths = [shape[0] * dist.get_world_size(group)] * shape[1]
        else:
            lengths = packed_lengths(packed)
        attended = attend_sliced(
            query, key, value, lengths=lengths, group=group, scale=self.softmax_scale
        ).flatten(1)
        if packed is None:
            attended = attended.view(shape[1], shape[0], -1).transpose(0, 1)
        return attended

    def _attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        """Return the attended values of packed sequences, [T, Hq, D]."""
        scale = self.softmax_scale
        if has_varlen_kernel(query):
            boundaries = packed.cu_seqlens_q.to(query.device, non_blocking=True)
            longest = packed.max_seqlen_q
            return attend_varlen(
                query,
                key,
                value,
                boundaries_q=boundaries,
                boundaries_k=boundaries,
                longest_q=longest,
                longest_k=longest,
                scale=scale,
            )
        runs = [(len(list(run)), length) for length, run in groupby(packed_lengths(packed))]
        tokens = [count * length for count, length in runs]
        parts = (torch.split(x, tokens) for x in (query, key, value))
        attended = []
        for run, *part in zip(runs, *parts, strict=True):
            query, key, value = (x.unflatten(0, run).transpose(1, 2) for x in part)
            values = attend_causally(query, key, value, scale=scale)
            attended.append(values.transpose(1, 2).flatten(0, 1))
        return torch.cat(attended)


class RowRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Rotary angles that differ between the rows of a decoding batch, or start anew in a pack."""

    positions_B: Tensor | None = None
    """While set: the position of the one token that each row holds."""
    is_sliced: bool = True
    """Whether context parallelism, if there is any, has cut the sequences: see whole_sequences."""

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int | tuple[int, ...]:
        """Return what GPTModel is to call forward with: a length, or those of packed sequences.

        They are those of whole sequences where context parallelism has cut them.
        """
        *others, config, packed_seq_params = args
        if packed_seq_params is not None:
            return tuple(packed_lengths(packed_seq_params))
        length: int = super().get_rotary_seq_len(*others, config, **kwargs)
        return length if self.is_sliced else length // config.context_parallel_size

    def forward(self, max_seq_len: int | tuple[int, ...], *args: Any, **kwargs: Any) -> Tensor:
        """Return the angles: [S, 1, 1, D], or [1, B, 1, D] while positions_B is set.

        Of a pack [T, 1, 1, D], which Megatron's rotary code takes as the angle of each token; with
        context parallelism those of the whole pack, of which it takes this rank's.
        """
        # Megatron's forward would slice for context parallelism, and remembers what it returned:
        # as if for a pack it returns the whole.
        kwargs["packed_seq"] = True
        if isinstance(max_seq_len, tuple):
            whole: Tensor = super().forward(max(max_seq_len), *args, **kwargs)
            return torch.cat([whole[:length] for length in max_seq_len])
        if self.positions_B is None:
            angles: Tensor = super().forward(max_seq_len, *args, **kwargs)
            return self._of_this_rank(angles) if self.is_sliced else angles
        inv_freq = self.inv_freq.to(self.positions_B.device)
        angles_BD = torch.outer(self.positions_B.to(inv_freq.dtype), inv_freq)
        return torch.cat([angles_BD, angles_BD], dim=-1)[None, :, None, :]

    def _of_this_rank(self, angles: Tensor) -> Tensor:
        rank, size = dist.get_rank(self.cp_group), dist.get_world_size(self.cp_group)
        if size == 1:
            return angles
        return angles[own_positions([len(angles)], rank=rank, size=size).to(angles.device)]
