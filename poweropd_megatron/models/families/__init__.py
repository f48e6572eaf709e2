"""Model families by their model_type in config.json, and what their tables say.

A family is a module with two functions: how its config.json is read, and its table of weights. The
trainer reads and writes its shards through `weights_of`; a converter between files, which needs no
model, through `stored_tensors`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families import llama, qwen3, qwen3_moe
from poweropd_megatron.models.families.config_file import ConfigFile
from poweropd_megatron.models.families.weight import StoredTensor, Weight
from poweropd_megatron.models.model_config import ModelConfig


class Family(Protocol):
    """What the module of a family holds."""

    def read_config(self, file: ConfigFile) -> ModelConfig:
        """Return the shape that config.json states; refuse what isn't modelled by its name."""

    def table(self, config: ModelConfig) -> Iterator[Weight]:
        """Yield the rows outside the layers and, with {layer} and {expert}, those of a layer."""


FAMILIES: dict[str, Family] = {"llama": llama, "qwen3": qwen3, "qwen3_moe": qwen3_moe}


def read_model_config(folder: str | Path, *, setting: str) -> ModelConfig:
    """Return the shape that a folder's config.json states, in old or transformers-5 spelling.

    Raises: InputError naming setting, file and field if the folder holds no model of a known
    family, or one with features that aren't modelled.
    """
    file = ConfigFile(folder, setting=setting)
    model_type = file.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise file.error(
            f"has model_type {model_type!r}; supported are "
            + ", ".join(map(repr, sorted(FAMILIES)))
        )
    return FAMILIES[model_type].read_config(file)


def weights_of(
    config: ModelConfig, layer_numbers: Sequence[int], *, ep_rank: int = 0, ep_size: int = 1
) -> Iterator[Weight]:
    """Yield the rows of a pipeline stage that holds these layers (counted from 0, in order).

    Of the experts only those that the expert-parallel rank holds.
    """
    rows = list(FAMILIES[config.model_type].table(config))
    num_local_experts = config.experts.num_moe_experts // ep_size if config.experts else 0
    yield from (row for row in rows if not row.stacked)
    for local_layer, layer in enumerate(layer_numbers):
        for row in rows:
            if row.is_expert:
                for local_expert in range(num_local_experts):
                    yield row.at(
                        layer=layer,
                        local_layer=local_layer,
                        expert=ep_rank * num_local_experts + local_expert,
                        local_expert=local_expert,
                    )
            elif row.stacked:
                yield row.at(layer=layer, local_layer=local_layer)


def stored_tensors(config: ModelConfig) -> Iterator[StoredTensor]:
    """Yield the tensors that a torch_dist checkpoint of the model consists of, the same for any
    parallel layout."""
    num_experts = config.experts.num_moe_experts if config.experts else 0
    for row in FAMILIES[config.model_type].table(config):
        if not row.is_copy:
            yield StoredTensor(weight=row, num_layers=config.num_layers, num_experts=num_experts)


def check_num_layers(config: ModelConfig, num_tensors: int, folder: Path, *, setting: str) -> None:
    """Return if a Hugging Face folder has at least a tensor for each layer (and expert of it).

    Called before hugging_face_shapes, which would make the names of a billion layers.
    Raises: InputError.
    """
    num_experts = config.experts.num_moe_experts if config.experts else 1
    if config.num_layers * num_experts > num_tensors:
        experts = f" of {num_experts} experts" if config.experts else ""
        raise InputError(
            f"{setting}: {folder / 'config.json'} describes {config.num_layers} layers{experts}, "
            f"but all the folder has is {num_tensors} tensors"
        )


def hugging_face_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a Hugging Face folder, by name.

    A folder with tied embeddings may hold lm_head.weight too, which equals model.embed_tokens.
    """
    return {
        name: shape
        for stored in stored_tensors(config)
        for _, weight in stored.parts()
        for name, shape in zip(weight.hugging_face, weight.shapes, strict=True)
    }
