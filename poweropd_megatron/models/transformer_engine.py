"""Transformer Engine's attention and context parallelism, where it is installed and can compute.

Shapes: S positions, B sequences, Hq query heads and Hk key heads on this rank, D channels a head,
T tokens of a pack. Under context parallelism S and T are those of this rank's slices.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from poweropd_megatron.config.schema import DType
from poweropd_megatron.models.layers import SDPACoreAttention


class TECoreAttention(SDPACoreAttention):
    """Transformer Engine's attention for whole forwards, and torch's while a rollout decodes.

    Training and scoring go through Megatron's TEDotProductAttention: rows as they are padded on the
    right, packs as sequences of variable lengths, and slices of context parallelism by the
    communication that cp_comm_type names. What a cache holds, or a rank has whole though context
    parallelism cuts the others', is SDPACoreAttention's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **of_layer: Any,
    ) -> None:
        super().__init__(config, softmax_scale, pg_collection)
        self.engine = megatron_te.TEDotProductAttention(
            config, softmax_scale=softmax_scale, pg_collection=pg_collection, **of_layer
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **_kwargs: Any,
    ) -> Tensor:
        """Return the attended values, in SDPACoreAttention's shapes."""
        is_whole_of_cut = self._cp_group is not None and not self.is_sliced
        if self.cache is not None or is_whole_of_cut:
            return super().forward(query, key, value, packed_seq_params=packed_seq_params)
        if packed_seq_params is not None:
            packed_seq_params = _on_device(packed_seq_params, query.device)
        attended: Tensor = self.engine(
            query, key, value, None, AttnMaskType.causal, packed_seq_params=packed_seq_params
        )
        return attended

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """Return nothing: there are no weights, and Transformer Engine's own state is empty."""
        return {}


def why_not_transformer_engine(backend: AttnBackend, dtype: DType) -> str | None:
    """Return why a model has torch's attention, None if it has Transformer Engine's."""
    if backend is AttnBackend.local:
        return "attention_backend is 'local'"
    if not megatron_te.HAVE_TE:
        return "Transformer Engine is not installed"
    if not torch.cuda.is_available():
        return "Transformer Engine needs a GPU, and torch finds none"
    if dtype != "bf16":
        return f"Transformer Engine has its fast kernels for bf16, not {dtype}"
    return None


def _on_device(packed: PackedSeqParams, device: torch.device) -> PackedSeqParams:
    """Return the boundaries of a pack where the kernels read them.

    Padded boundaries, which context parallelism asks for, are the same ones: a pack has no tokens
    between its sequences that belong to none.
    """
    boundaries = packed.cu_seqlens_q.to(device, non_blocking=True)
    return replace(
        packed,
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=boundaries,
        cu_seqlens_kv_padded=boundaries,
        pad_between_seqs=False,
    )
