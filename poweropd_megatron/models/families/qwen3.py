"""Qwen3, dense: grouped-query attention with normed query and key heads, SwiGLU.

Source: transformers/models/qwen3/modeling_qwen3.py.
"""

from collections.abc import Iterator

from poweropd_megatron.models.families import rows
from poweropd_megatron.models.families.config_file import ConfigFile, read_decoder
from poweropd_megatron.models.families.weight import Weight
from poweropd_megatron.models.model_config import ModelConfig


def read_config(file: ConfigFile) -> ModelConfig:
    """Return the shape that a Qwen3's config.json states; rope_theta and head_dim are in all."""
    return read_decoder(
        file,
        qk_layernorm=True,
        kv_channels=file.integer("head_dim"),
        num_query_groups=file.integer("num_key_value_heads"),
        rotary_base=file.rotary_base(),
    )


def table(config: ModelConfig) -> Iterator[Weight]:
    """Yield the rows of the model."""
    yield from rows.outer(config)
    yield from rows.attention(config)
    yield from rows.dense_mlp(config)
