"""Models that Megatron's dist_checkpointing fills from a folder, that run, and that it saves again.

Shapes: B sequences, S positions, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from poweropd_megatron.checkpoint import sharded
from poweropd_megatron.checkpoint.store import CheckpointStore
from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.inspection.logits import all_logits
from poweropd_megatron.models.build import build_chunks, padded_vocab_size
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import student_layout
from poweropd_megatron.parallel.pipeline import forward_stage

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A layout that a model is loaded into."""

    name: str
    world_size: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    megatron: dict[str, Any] = field(default_factory=dict)
    """Fields of Megatron's configuration, such as uneven stages."""


def load_run_save(
    cell: Cell, hugging_face: str, stored: str, target: str, ids_BS: Tensor
) -> Tensor | None:
    """Return the logits of our model, [B, S, V], on the last stage, after saving it as step 1.

    Its weights are NaN before Megatron loads the stored ones; the Hugging Face folder only says the
    shape.
    """
    cpu_device.install()
    layout = student_layout(cell.parallel, CPU, seed=1)
    model = read_model_config(hugging_face, setting="student.path")
    chunks = build_chunks(model, layout, dtype="fp32", megatron=cell.megatron)
    _load_and_save(chunks, stored, target)
    with torch.no_grad():
        return forward_stage(
            chunks, layout, ids_BS, output_processor=all_logits, context=(layout, model.vocab_size)
        )


def load_run_save_stock(
    cell: Cell, expert_tensor: int, hugging_face: str, stored: str, target: str, ids_BS: Tensor
) -> Tensor:
    """Return the logits of Megatron's own GPTModel, with its norm, attention and MoE layer.

    Of what is ours it has one thing: the stored name of the norm before experts.
    """
    cpu_device.install()
    tensor, expert = (
        cell.parallel.tensor_model_parallel_size,
        cell.parallel.expert_model_parallel_size,
    )
    parallel_state.initialize_model_parallel(
        tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = read_model_config(hugging_face, setting="student.path")
    chunk = _stock_model(model, tensor, expert, expert_tensor)
    _load_and_save([chunk], stored, target)
    mask = torch.triu(torch.ones(1, 1, *[ids_BS.shape[1]] * 2, dtype=torch.bool), 1)
    with torch.no_grad():
        logits: Tensor = chunk(ids_BS, torch.arange(ids_BS.shape[1])[None], mask)
    return logits[..., : model.vocab_size]


def _load_and_save(chunks: list[GPTModel], stored: str, target: str) -> None:
    for chunk in chunks:
        chunk.eval()
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)
    loaded = dist_checkpointing.load({"model": dict(_sharded(chunks))}, stored)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model"][number], strict=False)
        for name, parameter in chunk.named_parameters():
            assert not parameter.isnan().any(), name
    sharded.save({"model": dict(_sharded(chunks))}, CheckpointStore(Path(target)), 1)


def _sharded(chunks: list[GPTModel]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, chunk in enumerate(chunks):
        state = chunk.sharded_state_dict().items()
        yield number, {name: value for name, value in state if not name.endswith("_extra_state")}


def _stock_model(model: ModelConfig, tensor: int, expert: int, expert_tensor: int) -> GPTModel:
    experts: dict[str, Any] = {}
    if model.experts is not None:
        experts = {
            "num_moe_experts": model.experts.num_moe_experts,
            "moe_ffn_hidden_size": model.experts.moe_ffn_hidden_size,
            "moe_router_topk": model.experts.moe_router_topk,
            "moe_router_pre_softmax": not model.experts.norm_topk_prob,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_token_dispatcher_type": "alltoall",
        }
    config = TransformerConfig(
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
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        **experts,
    )
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=model.qk_layernorm,
        normalization="RMSNorm",
    )
    if model.experts is not None:
        layer.submodules.sharded_state_dict_keys_map = {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
        }
    return GPTModel(
        config,
        layer,
        vocab_size=padded_vocab_size(model.vocab_size, tensor),
        max_sequence_length=model.max_position_embeddings,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(model.rotary_base),
        parallel_output=False,
    )
