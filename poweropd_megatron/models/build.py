"""A model on Megatron-Core, its weights from a Hugging Face or a converted folder."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from poweropd_megatron.config.schema import DType, ParallelConfig
from poweropd_megatron.models import hf_weights
from poweropd_megatron.models.families import weights_of
from poweropd_megatron.models.layers import RMSNorm, RowRotaryEmbedding, SDPACoreAttention
from poweropd_megatron.models.megatron_settings import fields_of
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.moe import moe_settings, route_in_fp32, use_shared_moe_layer
from poweropd_megatron.models.transformer_engine import (
    TECoreAttention,
    why_not_transformer_engine,
)
from poweropd_megatron.models.weight_source import open_weights
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.world import agreed

TORCH_DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Return the embedding's rows over all ranks: the vocabulary rounded up to TP.

    The rows beyond vocab_size are zero, take no part in any softmax, and are never sampled or
    exported.
    """
    return -(-vocab_size // tp_size) * tp_size


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: DType, megatron: Mapping[str, Any]
) -> TransformerConfig:
    """Return Megatron's configuration of a model, with the fields that the user gave by name.

    Attention and MLP have no bias and no dropout; losses are summed over tokens, to be divided once
    by the global count; pipeline stages exchange the shape of each micro-batch, so that each has
    its own length. The interleaved schedule of a virtual pipeline sends without batching: in a
    batch, two stages couldn't tell what they send each other forward from what they send back.
    """
    torch_dtype = TORCH_DTYPES[dtype]
    is_interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    experts: dict[str, Any] = {}
    if model.experts is not None:
        experts = moe_settings(
            model.experts, expert_model_parallel_size=parallel.expert_model_parallel_size
        )
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.layernorm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=torch_dtype,
        pipeline_dtype=torch_dtype,
        bf16=dtype == "bf16",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable_seq_lengths
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **experts,
        **fields_of(TransformerConfig, megatron),
    )


def build_model(
    model: ModelConfig,
    layout: Layout,
    *,
    folder: str,
    dtype: DType,
    setting: str,
    megatron: Mapping[str, Any] = MappingProxyType({}),
) -> list[GPTModel]:
    """Return build_chunks' model chunks with the weights in a folder. Called by all ranks.

    Raises: InputError on all ranks if the folder's tensors don't fit its config.json.
    Cost: each rank reads its own slices; no collective but the tied embedding's in GPTModel and
    one to agree on errors.
    """
    chunks = build_chunks(model, layout, dtype=dtype, megatron=megatron)

    def load() -> None:
        source = open_weights(model, folder, setting=setting)
        for chunk in chunks:
            hf_weights.load(
                chunk.named_parameters(),
                weights_of(
                    model, layer_numbers(chunk), ep_rank=layout.ep_rank, ep_size=layout.ep_size
                ),
                source,
                tp_rank=layout.tp_rank,
                tp_size=layout.tp_size,
            )

    agreed(load)
    return chunks


def build_chunks(
    model: ModelConfig,
    layout: Layout,
    *,
    dtype: DType,
    megatron: Mapping[str, Any] = MappingProxyType({}),
) -> list[GPTModel]:
    """Return this rank's model chunks, in pipeline order, without weights. Called by all ranks.

    A rank has one chunk; with a virtual pipeline it has one of each round through the stages. Ranks
    outside the layout have none.
    """
    config = transformer_config(model, layout.parallel, dtype, megatron)
    rounds = config.virtual_pipeline_model_parallel_size
    stages: Iterable[int | None] = [None] if rounds is None else range(rounds)
    return [
        _build_chunk(model, config, layout, vp_stage=vp_stage)
        for vp_stage in (stages if layout.holds_model else ())
    ]


def _build_chunk(
    model: ModelConfig, config: TransformerConfig, layout: Layout, *, vp_stage: int | None
) -> GPTModel:
    is_first = vp_stage in (None, 0)
    is_last = vp_stage is None or vp_stage == config.virtual_pipeline_model_parallel_size - 1
    chunk = GPTModel(
        config,
        _block_spec(
            config, get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=layout.pp_rank)
        ),
        vocab_size=padded_vocab_size(model.vocab_size, layout.tp_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=layout.is_first_stage and is_first,
        post_process=layout.is_last_stage and is_last,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=cast(int, model.rotary_base),
        pg_collection=layout.groups,
        vp_stage=vp_stage,
    )
    chunk.rotary_pos_emb = RowRotaryEmbedding(
        kv_channels=model.kv_channels,
        rotary_percent=1.0,
        rotary_base=cast(int, model.rotary_base),
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=layout.groups.cp,
    )
    return chunk.to(layout.device)


def layer_numbers(chunk: GPTModel) -> list[int]:
    """Return the numbers, from 0, of the layers that a model chunk holds."""
    return [layer.layer_number - 1 for layer in chunk.decoder.layers]


def _block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """Return this many of Megatron's local layers, with our norm and attention."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    if config.num_moe_experts is not None:
        use_shared_moe_layer(layer)
        route_in_fp32()
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    dtype: DType = "bf16" if config.bf16 else "fp32"
    attention.core_attention = (
        SDPACoreAttention
        if why_not_transformer_engine(config.attention_backend, dtype)
        else TECoreAttention
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
