"""A model folder as a command reads it before it builds anything, and its checks."""

from typing import Literal

from poweropd_megatron.config import rules
from poweropd_megatron.config.schema import StudentConfig, TeacherConfig
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import ConfigError, InputError
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.weight_source import open_weights
from poweropd_megatron.ops.backends import reference_is_asked_for


def check_kernels() -> None:
    """Return if the environment's choice of kernels exists. Raises: ConfigError."""
    try:
        reference_is_asked_for()
    except ValueError as error:
        raise ConfigError(str(error)) from None


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
