"""What a model's parallel settings must be together, and its logits."""

from collections.abc import Mapping
from typing import Any

from poweropd_megatron.config.schema import DType, ParallelConfig
from poweropd_megatron.errors import ConfigError


def check_parallel(name: str, parallel: ParallelConfig) -> None:
    """Return if no setting asks for what another one rules out.

    Raises: ConfigError that names both.
    """
    _check_sequence_parallel(name, parallel)
    _check_virtual_pipeline(name, parallel)


def check_exchanged_heads(
    name: str, parallel: ParallelConfig, megatron: Mapping[str, Any], *, heads: int, groups: int
) -> None:
    """Return if context-parallel ranks can exchange sequences for heads, if they are to.

    heads, groups: the model's query heads and key-value heads.

    Raises: ConfigError that names the settings and what would work.
    """
    if megatron.get("cp_comm_type") != "a2a":
        return
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    own_heads, own_groups = heads // tensor, max(groups // tensor, 1)
    if own_heads % context or own_groups % context:
        raise ConfigError(
            f"{name}.megatron.cp_comm_type = 'a2a' needs {name}.parallel.context_parallel_size = "
            f"{context} to divide the {own_heads} query heads and the {own_groups} key-value heads "
            "that tensor parallelism leaves to a rank: choose 'p2p', or leave it out"
        )


def check_logits(setting: str, logits_dtype: DType, name: str, dtype: DType) -> None:
    """Return if a model of this type can have logits of that type. Raises: ConfigError."""
    if logits_dtype == "bf16" and dtype != "bf16":
        raise ConfigError(
            f"{setting} = 'bf16' needs {name}.dtype = 'bf16', not {dtype!r}: set that, or "
            f"{setting} = 'fp32'"
        )


def _check_sequence_parallel(name: str, parallel: ParallelConfig) -> None:
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError(
            f"{name}.parallel.sequence_parallel = true needs "
            f"{name}.parallel.tensor_model_parallel_size > 1, not 1: raise it, or set "
            f"{name}.parallel.sequence_parallel = false"
        )


def _check_virtual_pipeline(name: str, parallel: ParallelConfig) -> None:
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is not None and parallel.pipeline_model_parallel_size == 1:
        raise ConfigError(
            f"{name}.parallel.virtual_pipeline_model_parallel_size = {chunks} needs "
            f"{name}.parallel.pipeline_model_parallel_size > 1, not 1: raise it, or leave out "
            "virtual_pipeline_model_parallel_size"
        )
