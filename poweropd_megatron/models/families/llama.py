"""Llama, dense, without rope scaling: Llama 1 and 2, SmolLM2 and others of that model_type.

Source: transformers/models/llama/{configuration,modeling}_llama.py.
"""

from collections.abc import Iterator

from poweropd_megatron.models.families import rows
from poweropd_megatron.models.families.config_file import ConfigFile, read_decoder
from poweropd_megatron.models.families.weight import Weight
from poweropd_megatron.models.model_config import ModelConfig


def read_config(file: ConfigFile) -> ModelConfig:
    """Return the shape that a Llama's config.json states.

    Older files leave out what was the only choice then: as many KV heads as heads, heads that share
    out the hidden size, and a rope_theta of 10,000.
    """
    file.refuse_truthy("mlp_bias", "rope_interleaved")
    num_heads, hidden_size = file.integer("num_attention_heads"), file.integer("hidden_size")
    if file.get("head_dim") is None and hidden_size % num_heads:
        raise file.error(
            f"has no head_dim, and hidden_size = {hidden_size} is no multiple of "
            f"num_attention_heads = {num_heads}"
        )
    return read_decoder(
        file,
        qk_layernorm=False,
        kv_channels=file.integer("head_dim", default=hidden_size // num_heads),
        num_query_groups=file.integer("num_key_value_heads", default=num_heads),
        rotary_base=file.rotary_base(default=10_000.0),
    )


def table(config: ModelConfig) -> Iterator[Weight]:
    """Yield the rows of the model."""
    yield from rows.outer(config)
    yield from rows.attention(config)
    yield from rows.dense_mlp(config)
