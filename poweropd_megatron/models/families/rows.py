"""Rows that families share: embeddings, attention, gated MLPs, experts.

Source: megatron/core/models/gpt/gpt_layer_specs.py (names of the local layers and, in
sharded_state_dict_keys_map, of what is stored), megatron/core/transformer/attention.py (rows of
linear_qkv: for each KV head its query heads, then its key, then its value), transformer_block.py
and moe/experts.py (layers and experts as dimensions of the stored tensor).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from poweropd_megatron.models.families.weight import Weight
from poweropd_megatron.models.model_config import ModelConfig


def outer(config: ModelConfig) -> Iterator[Weight]:
    """Yield the rows outside the layers.

    With tied embeddings the last pipeline stage holds its own copy of them as output_layer.weight.
    """
    embedding = Weight(
        megatron="embedding.word_embeddings.weight",
        stored="embedding.word_embeddings.weight",
        hugging_face=("model.embed_tokens.weight",),
        shapes=((config.vocab_size, config.hidden_size),),
        dim=0,
        is_vocabulary=True,
    )
    yield embedding
    yield Weight(
        megatron="decoder.final_layernorm.weight",
        stored="decoder.final_layernorm.weight",
        hugging_face=("model.norm.weight",),
        shapes=((config.hidden_size,),),
    )
    head = "output_layer.weight"
    if config.tie_word_embeddings:
        yield replace(embedding, megatron=head, is_copy=True)
    else:
        yield replace(embedding, megatron=head, stored=head, hugging_face=("lm_head.weight",))


def attention(config: ModelConfig) -> Iterator[Weight]:
    """Yield the rows of a layer's attention, with the norm before it."""
    hidden, width = config.hidden_size, config.kv_channels
    queries, keys = config.num_attention_heads * width, config.num_query_groups * width
    rows = [queries // config.num_query_groups, width, width]

    def merge(pieces: Sequence[Tensor]) -> Tensor:
        grouped = [
            piece.reshape(-1, size, piece.shape[-1])
            for piece, size in zip(pieces, rows, strict=True)
        ]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(merged: Tensor) -> Sequence[Tensor]:
        grouped = merged.reshape(-1, sum(rows), merged.shape[-1])
        return [part.flatten(0, 1) for part in torch.split(grouped, rows, dim=1)]

    yield _of_layer(
        "input_layernorm.weight",
        "input_layernorm.weight",
        stored="self_attention.linear_qkv.layer_norm_weight",
        shapes=((hidden,),),
    )
    yield _of_layer(
        "self_attention.linear_qkv.weight",
        *(f"self_attn.{name}_proj.weight" for name in "qkv"),
        shapes=((queries, hidden), (keys, hidden), (keys, hidden)),
        dim=0,
        num_query_groups=config.num_query_groups,
        merge=merge,
        split=split,
    )
    for name in "qk" if config.qk_layernorm else "":
        yield _of_layer(
            f"self_attention.{name}_layernorm.weight",
            f"self_attn.{name}_norm.weight",
            shapes=((width,),),
        )
    yield _of_layer(
        "self_attention.linear_proj.weight",
        "self_attn.o_proj.weight",
        shapes=((hidden, queries),),
        dim=1,
    )


def dense_mlp(config: ModelConfig) -> Iterator[Weight]:
    """Yield the rows of a layer's MLP, with the norm before it."""
    yield _of_layer(
        "pre_mlp_layernorm.weight",
        "post_attention_layernorm.weight",
        stored="mlp.linear_fc1.layer_norm_weight",
        shapes=((config.hidden_size,),),
    )
    yield from _gated_mlp("mlp.", "mlp.", "mlp.", config.hidden_size, config.ffn_hidden_size)


def mixture_of_experts(config: ModelConfig) -> Iterator[Weight]:
    """Yield the rows of a layer's router and experts, with the norm before them.

    That norm is stored under a name of its own, as Transformer Engine's layers have it.
    """
    assert config.experts is not None
    hidden, num_experts = config.hidden_size, config.experts.num_moe_experts
    yield _of_layer(
        "pre_mlp_layernorm.weight", "post_attention_layernorm.weight", shapes=((hidden,),)
    )
    yield _of_layer("mlp.router.weight", "mlp.gate.weight", shapes=((num_experts, hidden),))
    yield from _gated_mlp(
        "mlp.experts.local_experts.{expert}.",
        "mlp.experts.experts.",
        "mlp.experts.{expert}.",
        hidden,
        config.experts.moe_ffn_hidden_size,
        stacked=("layer", "expert"),
    )


def _gated_mlp(
    megatron: str, stored: str, theirs: str, hidden: int, ffn: int, **of_experts: Any
) -> Iterator[Weight]:
    """Yield the rows of one gated MLP; tensor parallelism leaves an expert's whole."""
    yield _of_layer(
        megatron + "linear_fc1.weight",
        theirs + "gate_proj.weight",
        theirs + "up_proj.weight",
        stored=stored + "linear_fc1.weight",
        shapes=((ffn, hidden), (ffn, hidden)),
        dim=None if of_experts else 0,
        merge=lambda pieces: torch.cat(list(pieces)),
        split=lambda merged: merged.chunk(2),
        **of_experts,
    )
    yield _of_layer(
        megatron + "linear_fc2.weight",
        theirs + "down_proj.weight",
        stored=stored + "linear_fc2.weight",
        shapes=((hidden, ffn),),
        dim=None if of_experts else 1,
        **of_experts,
    )


def _of_layer(
    megatron: str, *hugging_face: str, stored: str | None = None, **others: Any
) -> Weight:
    """Return a row with names inside a layer; it is stored under Megatron's unless said."""
    return Weight(
        megatron="decoder.layers.{layer}." + megatron,
        stored="decoder.layers." + (stored or megatron),
        hugging_face=tuple("model.layers.{layer}." + name for name in hugging_face),
        **({"stacked": ("layer",)} | others),
    )
