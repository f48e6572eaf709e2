"""A stand-in for Megatron's TEDotProductAttention, in plain torch, for machines without CUDA.

It takes what Transformer Engine's documentation says: rows as [S, B, H, D]; packs as [T, H, D] with
int32 boundaries on the device of the values; under context parallelism, of every sequence, slices r
and 2 * C - 1 - r on rank r, and boundaries of whole sequences. Anything else is an assertion.
"""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from poweropd_megatron.models import attention_settings, build
from poweropd_megatron.models.transformer_engine import TECoreAttention


class TEDotProductAttention(torch.nn.Module):
    """Causal attention over whole scores, with the arguments of Megatron's class."""

    calls: ClassVar[list[str]] = []
    """The layout of each call, of all instances of the process."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = "p2p",
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type is AttnMaskType.causal
        assert attention_type == "self"
        assert attention_dropout is k_channels is v_channels is num_splits is None
        assert pg_collection is not None
        self.config, self.layer_number, self.cp_comm_type = config, layer_number, cp_comm_type
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self._cp_group = pg_collection.cp
        self._groups_on_rank = config.num_query_groups // dist.get_world_size(pg_collection.tp)
        assert dist.get_world_size(self._cp_group) == config.context_parallel_size

    def get_extra_state(self) -> Tensor:
        """Return what Transformer Engine's modules put into every state_dict."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take what get_extra_state returned."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        assert attention_mask is attention_bias is num_splits is None
        assert attn_mask_type is AttnMaskType.causal
        assert key.shape[-2] == value.shape[-2] == self._groups_on_rank
        assert query.shape[0] > 1, "cuDNN has no kernel for one position"
        type(self).calls.append("sbhd" if packed_seq_params is None else "thd")
        if packed_seq_params is not None:
            return self._attend(query, key, value, self._lengths(packed_seq_params, query))
        rows = query.shape[1]
        flat = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        size = dist.get_world_size(self._cp_group)
        attended = self._attend(*flat, lengths=[query.shape[0] * size] * rows)
        return attended.unflatten(0, (rows, -1)).transpose(0, 1)

    def _lengths(self, packed: PackedSeqParams, query: Tensor) -> list[int]:
        boundaries = packed.cu_seqlens_q
        assert packed.qkv_format == "thd"
        assert boundaries.dtype == torch.int32
        assert boundaries.device == query.device
        assert packed.cu_seqlens_kv is boundaries
        assert packed.cu_seqlens_q_padded is packed.cu_seqlens_kv_padded is boundaries
        assert packed.pad_between_seqs is False
        lengths: list[int] = boundaries.diff().tolist()
        assert packed.max_seqlen_q == packed.max_seqlen_kv == max(lengths)
        assert query.shape[0] * dist.get_world_size(self._cp_group) == sum(lengths)
        return lengths

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """Return the values of this rank's tokens, [T, Hq * D], of sequences end to end."""
        size, rank = dist.get_world_size(self._cp_group), dist.get_rank(self._cp_group)
        places = [_places(lengths, number, size) for number in range(size)]
        if size > 1:
            key, value = (
                gather_from_sequence_parallel_region(x, group=self._cp_group) for x in (key, value)
            )
        queries, keys = places[rank], torch.cat(places)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = torch.einsum("shd,thd->hst", query, key) * self.softmax_scale
        is_seen = (queries[:, None, 0] == keys[None, :, 0]) & (
            queries[:, None, 1] >= keys[None, :, 1]
        )
        weights = scores.masked_fill(~is_seen, float("-inf")).softmax(dim=-1)
        return torch.einsum("hst,thd->shd", weights, value).flatten(1)


def _places(lengths: list[int], rank: int, size: int) -> Tensor:
    """Return the sequence and the position of each token on a rank, [T, 2]."""
    places = []
    for sequence, length in enumerate(lengths):
        width = length // (2 * size)
        assert width * 2 * size == length or size == 1
        positions = (
            range(length)
            if size == 1
            else [n * width + i for n in (rank, 2 * size - 1 - rank) for i in range(width)]
        )
        places += [(sequence, position) for position in positions]
    return torch.tensor(places)


def core_attention(
    config: TransformerConfig, groups: ProcessGroupCollection, softmax_scale: float | None = None
) -> TECoreAttention:
    """Return the attention of a layer as Megatron builds it."""
    return TECoreAttention(
        config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=softmax_scale,
        pg_collection=groups,
    )


def install() -> None:
    """Build this process's models with the stand-in, for any type and on any device."""
    megatron_te.TEDotProductAttention = TEDotProductAttention
    for module in (build, attention_settings):
        module.why_not_transformer_engine = lambda backend, dtype: None  # noqa: ARG005
