"""Qwen3-MoE: a Qwen3 whose every layer has a mixture of experts in the place of the MLP.

Source: transformers/models/qwen3_moe/modeling_qwen3_moe.py.
"""

from collections.abc import Iterator
from dataclasses import replace

from poweropd_megatron.models.families import qwen3, rows
from poweropd_megatron.models.families.config_file import ConfigFile
from poweropd_megatron.models.families.weight import Weight
from poweropd_megatron.models.model_config import ExpertsConfig, ModelConfig


def read_config(file: ConfigFile) -> ModelConfig:
    """Return the shape that a Qwen3-MoE's config.json states.

    Raises: InputError if some layers have no experts, or tokens a single one of weight 1; no
    published model is so.
    """
    file.refuse_truthy("mlp_only_layers")
    file.refuse_unless("decoder_sparse_step", 1)
    file.refuse_two_values("num_experts", "num_local_experts")
    dense = qwen3.read_config(file)
    is_old = file.get("num_experts") is not None or file.get("num_local_experts") is None
    experts = ExpertsConfig(
        num_moe_experts=file.integer("num_experts" if is_old else "num_local_experts"),
        moe_router_topk=file.integer("num_experts_per_tok"),
        moe_ffn_hidden_size=file.integer("moe_intermediate_size"),
        norm_topk_prob=file.flag("norm_topk_prob"),
    )
    if experts.moe_router_topk > experts.num_moe_experts:
        raise file.error(
            f"num_experts_per_tok is {experts.moe_router_topk}, more than the "
            f"{experts.num_moe_experts} experts"
        )
    if experts.moe_router_topk == 1 and experts.norm_topk_prob:
        raise file.error(
            "num_experts_per_tok is 1 and norm_topk_prob is true: Megatron's router gives the one "
            "expert of a token its probability as its weight, not 1"
        )
    return replace(dense, experts=experts)


def table(config: ModelConfig) -> Iterator[Weight]:
    """Yield the rows of the model."""
    yield from rows.outer(config)
    yield from rows.attention(config)
    yield from rows.mixture_of_experts(config)
