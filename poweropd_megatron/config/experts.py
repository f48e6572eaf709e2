"""How a model's experts are shared out over ranks."""

import math
from collections.abc import Mapping
from typing import Any

from poweropd_megatron.config.choices import divisors, listed
from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.errors import ConfigError

RECOMPUTED_MODULES = ("core_attn", "mlp", "moe")
"""What Megatron's recompute_modules can name in these models; its "layernorm" calls Transformer
Engine, installed or not."""


def check_expert_ranks(name: str, parallel: ParallelConfig, world_size: int) -> None:
    """Return if the ranks of a pipeline stage can share experts.

    Those that share run each forward together, so they must be whole model copies, or parts of one.

    Raises: ConfigError that names the sizes that would work.
    """
    expert, tensor = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    ranks = world_size // parallel.pipeline_model_parallel_size

    def fits(size: int) -> bool:
        return ranks % size == 0 and (size % tensor == 0 or tensor % size == 0)

    if not fits(expert):
        working = [size for size in range(1, ranks + 1) if fits(size)]
        raise ConfigError(
            f"{name}.parallel.expert_model_parallel_size = {expert} must divide the ranks of a "
            f"pipeline stage ({ranks}), and divide or be a multiple of "
            f"{name}.parallel.tensor_model_parallel_size = {tensor}; {listed(working)} would work "
            "if they divide the experts"
        )


def check_experts(name: str, parallel: ParallelConfig, num_moe_experts: int | None) -> None:
    """Return if the layout can share out a model's experts; num_moe_experts is None if dense.

    Megatron trains experts with tensor parallelism only where sequence parallelism gives each rank
    tokens of its own.

    Raises: ConfigError that names the settings and what would work.
    """
    expert, setting = parallel.expert_model_parallel_size, "parallel.expert_model_parallel_size"
    if num_moe_experts is None:
        if expert > 1:
            raise ConfigError(
                f"{name}.{setting} = {expert} needs experts, but {name}.path is a dense model: "
                "set it to 1"
            )
        return
    if num_moe_experts % expert:
        tensor = parallel.tensor_model_parallel_size
        # Divisors of a size that the ranks can share, so the ranks can share these too.
        working = [
            size
            for size in divisors(math.gcd(num_moe_experts, expert))
            if size % tensor == 0 or tensor % size == 0
        ]
        raise ConfigError(
            f"{name}.{setting} = {expert} must divide the {name}'s experts ({num_moe_experts}); "
            f"{listed(working)} would work"
        )
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"{name}.parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size} "
            f"with experts needs {name}.parallel.sequence_parallel = true: set that, or set "
            f"{name}.parallel.tensor_model_parallel_size = 1"
        )


def check_recomputed(name: str, megatron: Mapping[str, Any], num_moe_experts: int | None) -> None:
    """Return if what is to be computed again is in the model; num_moe_experts is None if dense.

    Raises: ConfigError that names the setting and the module that would work.
    """
    absent, present = ("moe", "mlp") if num_moe_experts is None else ("mlp", "moe")
    if absent in (megatron.get("recompute_modules") or ()):
        kind = "a dense model" if num_moe_experts is None else "a model with experts"
        raise ConfigError(
            f"{name}.megatron.recompute_modules has {absent!r}, but {name}.path is {kind}, whose "
            f"feed-forward is {present!r}: name that, or leave it out"
        )
