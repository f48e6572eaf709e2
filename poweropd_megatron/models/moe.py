"""A mixture of experts: Megatron's settings for it, and its layer.

Shapes: S positions, B sequences, N tokens, H hidden.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.nn import functional

from poweropd_megatron.models.model_config import ExpertsConfig


def moe_settings(experts: ExpertsConfig, *, expert_model_parallel_size: int) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig that make it a Qwen3-MoE's.

    Every token reaches its experts (no capacity, no dropping), and no loss balances them: the
    gradient is the objective's alone. Logits and weights of the router are fp32.
    Source: Qwen3MoeTopKRouter of transformers. Its softmax is over all experts; scaled to a sum of
    1, the weights of the chosen ones are the softmax over these alone, which is what Megatron
    computes without moe_router_pre_softmax.
    """
    return {
        "num_moe_experts": experts.num_moe_experts,
        "moe_router_topk": experts.moe_router_topk,
        "moe_ffn_hidden_size": experts.moe_ffn_hidden_size,
        "moe_router_pre_softmax": not experts.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }


class SharedMoELayer(MoELayer):  # type: ignore[misc]
    """Megatron's MoE layer, whose tokens are shared out over the tensor-parallel ranks.

    With sequence parallelism each rank comes with tokens of its own. Without it, as in decoding,
    all have the same ones, which the experts would compute once for each rank; here each rank takes
    its share of them, and the results are gathered. That has no backward: Megatron's layer refuses
    to be trained with tensor parallelism and without sequence parallelism.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the experts' output and no bias.

        Shapes: hidden_states and output [S, B, H].
        Cost: without sequence parallelism one all-gather of the output over the TP ranks.
        """
        size, rank = self.attn_tp_group.size(), self.attn_tp_group.rank()
        if self.training or size == 1 or self.config.sequence_parallel:
            return super().forward(hidden_states, *args, **kwargs)
        tokens_NH = hidden_states.flatten(0, 1)
        share = -(-len(tokens_NH) // size)
        padded_NH = functional.pad(tokens_NH, (0, 0, 0, share * size - len(tokens_NH)))
        output, bias = super().forward(padded_NH.chunk(size)[rank][:, None], *args, **kwargs)
        gathered_NH = torch.empty_like(padded_NH)
        dist.all_gather_into_tensor(gathered_NH, output[:, 0].contiguous(), self.attn_tp_group)
        return gathered_NH[: len(tokens_NH)].view_as(hidden_states), bias


def route_in_fp32() -> None:
    """Let Megatron's routers multiply by torch, in this process, as they do without CUDA.

    Where Transformer Engine is installed they take its GEMM, which is TF32 for fp32 operands:
    tokens then go to other experts wherever two are nearly as likely.
    """
    moe_utils.te_general_gemm = None


def use_shared_moe_layer(layer: Any) -> None:
    """Put our layer in the place of Megatron's in a spec with experts, and mend its keys.

    The local spec names the norm before the MLP in checkpoints as if it were fused with the dense
    MLP's first matrix; with experts Transformer Engine's spec doesn't, and so one format has two
    names there.
    """
    layer.submodules.mlp = partial(SharedMoELayer, **layer.submodules.mlp.keywords)
    layer.submodules.sharded_state_dict_keys_map = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
    }
