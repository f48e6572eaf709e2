"""How a model's layers are dealt out over pipeline stages and the chunks of each stage."""

from collections.abc import Mapping
from typing import Any, Literal

from poweropd_megatron.config.choices import listed
from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.errors import ConfigError

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
UNEVEN = (FIRST, LAST, EMBEDDING, LOSS)
"""Megatron's settings that give the outer stages another number of layers than the others."""


def check_pipeline(
    name: Literal["student", "teacher"],
    parallel: ParallelConfig,
    megatron: Mapping[str, Any],
    num_layers: int,
) -> None:
    """Return if each chunk of each stage gets a layer when Megatron deals them out.

    Raises: ConfigError that names the settings and what would work.
    """
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    uneven = {
        setting: megatron[setting]
        for setting in UNEVEN
        if megatron.get(setting) is not None and megatron[setting] is not False
    }
    size = f"{name}.parallel.pipeline_model_parallel_size"
    if uneven and stages == 1:
        raise ConfigError(
            f"{name}.megatron.{next(iter(uneven))} needs {size} > 1, not 1: raise it, or leave "
            "the other out"
        )
    if {FIRST, LAST} & uneven.keys() and {EMBEDDING, LOSS} & uneven.keys():
        first, *_, last = uneven
        raise ConfigError(
            f"{name}.megatron.{first} can't be given together with {name}.megatron.{last}: one "
            "says how many layers a stage has, the other works it out; leave one out"
        )
    problem = _problem(stages, chunks, uneven, num_layers)
    if problem is None:
        return
    given = {size: stages}
    if chunks > 1:
        given[f"{name}.parallel.virtual_pipeline_model_parallel_size"] = chunks
    given |= {f"{name}.megatron.{setting}": value for setting, value in uneven.items()}
    wrong = (
        f"{size} = {stages} must divide the {name}'s layers ({num_layers})"
        if len(given) == 1
        else f"{_assigned(given)} can't deal out the {name}'s layers ({num_layers}): {problem}"
    )
    raise ConfigError(f"{wrong}; {_remedies(name, stages, chunks, uneven, num_layers)}")


def _problem(stages: int, chunks: int, uneven: Mapping[str, Any], num_layers: int) -> str | None:
    """Return what is wrong with a layout, None if every chunk gets its layers.

    Source: megatron/core/transformer/transformer_block.py, get_num_layers_to_build;
    transformer_layer.py, get_transformer_layer_offset (which, with chunks, divides by the number of
    stages that aren't given).
    """
    embedding, loss = bool(uneven.get(EMBEDDING)), bool(uneven.get(LOSS))
    outer = {0: uneven.get(FIRST), stages - 1: uneven.get(LAST)}
    given = {stage: count for stage, count in outer.items() if count is not None}
    rest, others = num_layers + embedding + loss - sum(given.values()), stages - len(given)
    counted = "".join(
        f" and the {what}" for what, holds in (("embedding", embedding), ("loss", loss)) if holds
    )
    if rest < 0 or (rest > 0 and others == 0) or (others and rest % others):
        where = "other stages" if given else "stages"
        return f"{rest} layers{counted} don't come out even over {others} {where}"
    if chunks > 1 and others == 0:
        return f"with chunks, Megatron needs {FIRST} or {LAST} left out where there are 2 stages"
    for stage in range(stages):
        count = given.get(stage, rest // others if others else 0)
        if count % chunks:
            return f"the {count} of stage {stage} don't come out even over {chunks} chunks"
        taken = max(embedding * (stage == 0), loss * (stage == stages - 1))
        if count // chunks - taken < 1:
            return f"stage {stage} would have a chunk without a layer"
    return None


def _remedies(
    name: str, stages: int, chunks: int, uneven: Mapping[str, Any], num_layers: int
) -> str:
    """Return the nearest layouts that would work, in words."""

    def works(stages: int, chunks: int, uneven: Mapping[str, Any]) -> bool:
        return (stages > 1 or not (chunks > 1 or uneven)) and (
            _problem(stages, chunks, uneven, num_layers) is None
        )

    found = []
    sizes = [other for other in range(1, num_layers + 3) if works(other, chunks, uneven)]
    if sizes:
        of_what = "pipeline_model_parallel_size = " if chunks > 1 or uneven else ""
        found.append(of_what + listed(sizes))
    counts = [other for other in range(2, num_layers + 1) if works(stages, other, uneven)]
    if chunks > 1 and counts:
        found.append(f"virtual_pipeline_model_parallel_size = {listed(counts)}")
    if chunks > 1 and works(stages, 1, uneven):
        found.append("no virtual_pipeline_model_parallel_size")
    splits = [
        {FIRST: first, LAST: last} if last else {FIRST: first}
        for last in range(num_layers + 1)
        for first in range(1, num_layers + 1)
    ]
    fitting = [split for split in splits if works(stages, chunks, split)]
    if fitting:
        even = num_layers / stages
        nearest = min(fitting, key=lambda split: max(abs(n - even) for n in split.values()))
        found.append(_assigned({f"{name}.megatron.{key}": value for key, value in nearest.items()}))
    if not found:
        return f"only {num_layers} stages, or fewer, can have a layer each"
    first, *others = found
    return f"{first} would work" + "".join(f", or {other}" for other in others)


def _assigned(settings: Mapping[str, Any]) -> str:
    return " with ".join(
        f"{name} = {'true' if value is True else value}" for name, value in settings.items()
    )
