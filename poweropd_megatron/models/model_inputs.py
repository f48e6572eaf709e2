"""A model folder as a command reads it before it builds anything, and its checks."""

import os
from typing import Literal

from poweropd_megatron.config import rules
from poweropd_megatron.config.schema import StudentConfig, TeacherConfig
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import ConfigError, InputError
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.weight_source import open_weights
from poweropd_megatron.ops.backends import reference_is_asked_for

_SWITCHES = {
    "flash": "NVTE_FLASH_ATTN",
    "fused": "NVTE_FUSED_ATTN",
    "unfused": "NVTE_UNFUSED_ATTN",
}
"""The variables by which Megatron tells Transformer Engine which attention kernels it may use."""
_LAYER_SCALING = "NVTE_APPLY_QK_LAYER_SCALING"


def check_kernels(attention_backend: str = "auto") -> None:
    """Return if the environment's choice of kernels exists, and goes with Megatron's own settings.

    Megatron sets some of Transformer Engine's variables, and ends with an assertion where they are
    set otherwise. Raises: ConfigError.
    """
    try:
        reference_is_asked_for()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if os.environ.get(_LAYER_SCALING, "0") != "0":
        raise ConfigError(
            f"{_LAYER_SCALING} = {os.environ[_LAYER_SCALING]} in the environment scales attention "
            "in a way that these models don't have: unset it"
        )
    for kernel, variable in _SWITCHES.items():
        expected = str(int(attention_backend in ("auto", kernel)))
        found = os.environ.get(variable, expected)
        if found != expected:
            raise ConfigError(
                f"{variable} = {found} in the environment, but attention_backend = "
                f"{attention_backend!r} makes it {expected}: unset it; for training, "
                "student.megatron.attention_backend and teacher.megatron.attention_backend choose "
                "the kernels"
            )


def read_model(
    name: Literal["student", "teacher"], part: StudentConfig | TeacherConfig
) -> ModelConfig:
    """Return a model's shape, after looking for its tensors and whether its layout can cut it.

    Raises: ConfigError or InputError that names the setting.
    """
    setting = f"{name}.path"
    model = read_model_config(part.path, setting=setting)
    open_weights(model, part.path, setting=setting)
    rules.check_model_layout(
        name,
        part.parallel,
        part.megatron,
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size,
        num_moe_experts=model.experts.num_moe_experts if model.experts else None,
    )
    return model


def check_tokens(model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Return if the student has a row for every token of its tokenizer. Raises: InputError."""
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"student.path: the tokenizer has {tokenizer.vocab_size} tokens, but config.json "
            f"says vocab_size {model.vocab_size}"
        )


def check_positions(
    setting: str, new_tokens: int, prompt_length: int, name: str, model: ModelConfig
) -> None:
    """Return if responses end within the positions that a model was made for.

    prompt_length: tokens of the longest prompt. Raises: ConfigError naming the setting.
    """
    if prompt_length + new_tokens > model.max_position_embeddings:
        raise ConfigError(
            f"{setting} = {new_tokens} after a prompt of {prompt_length} tokens exceeds the "
            f"{name}'s max_position_embeddings ({model.max_position_embeddings}): use at most "
            f"{model.max_position_embeddings - prompt_length}, or leave out the long prompts"
        )
