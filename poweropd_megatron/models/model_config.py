"""The shape of a model, under Megatron-Core's names. How it is read: models/families."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts that each layer has."""

    num_moe_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    norm_topk_prob: bool
    """Whether the weights of a token's experts are scaled to a sum of 1 (Hugging Face's name)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Dimensions of a decoder with rotary embeddings, RMSNorm and gated MLPs without biases."""

    model_type: str
    """The family's name in config.json, such as qwen3_moe."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    tie_word_embeddings: bool
    qk_layernorm: bool
    """Whether each query and each key head has an RMSNorm before the rotary embedding."""
    experts: ExpertsConfig | None = None
    """None: dense. With experts no layer has an MLP of ffn_hidden_size."""
