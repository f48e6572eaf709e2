"""What a checkpoint itself says of its model: its run's record, and config.json beside weights."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.model_config import ExpertsConfig, ModelConfig
from poweropd_megatron.models.torch_dist_folder import TorchDistFolder
from poweropd_megatron.models.weight_source import WEIGHTS_NAME


def recorded_model(folder: TorchDistFolder, common: dict[str, Any]) -> ModelConfig | None:
    """Return the model that a training run recorded in its common state; None for other writers.

    Raises: InputError if the record has other fields than a model has here.
    """
    run = common.get("run")
    stated = run.get("model") if isinstance(run, dict) else None
    if not isinstance(stated, dict):
        return None
    try:
        experts = stated.get("experts")
        return ModelConfig(**(stated | {"experts": ExpertsConfig(**experts) if experts else None}))
    except TypeError as error:
        raise InputError(
            f"{folder.setting}: {folder.path}: the run's model can't be read: {error}; it was "
            "recorded by another version"
        ) from None


def check_reference(
    config: ModelConfig, reference: Path, source: Path, folder: TorchDistFolder, *, setting: str
) -> None:
    """Return if a reference describes the model that the input says it is, where it says so.

    Tensors of the same shapes don't tell models of, say, another rope_theta apart.
    Raises: InputError naming the fields with both values.
    """
    given = _values(config)
    for place, model in _stated_models(source, folder):
        stated = _values(model)
        differing = [
            f"{name} is {given.get(name)}, not {stated.get(name)}"
            for name in stated | given
            if given.get(name) != stated.get(name)
        ]
        if differing:
            raise InputError(
                f"{setting}: {reference / 'config.json'} describes another model than {place}: "
                f"{', '.join(differing)}; name the folder that the model came from"
            )


def _stated_models(source: Path, folder: TorchDistFolder) -> Iterator[tuple[Path, ModelConfig]]:
    """Yield where the input states its model, and which one."""
    places = [source]
    weights = folder.path.resolve()
    if weights.name == WEIGHTS_NAME:
        places.append(weights.parent)
    for place in places:
        if (place / "config.json").is_file():
            yield place / "config.json", read_model_config(place, setting=folder.setting)
    try:
        common = folder.common_state()
    except InputError:  # Megatron-LM's has objects of its own, and no record of ours
        return
    recorded = recorded_model(folder, common)
    if recorded is not None:
        yield folder.path, recorded


def _values(config: ModelConfig) -> dict[str, Any]:
    values = asdict(config)
    experts = values.pop("experts") or {}
    return values | {f"experts.{name}": value for name, value in experts.items()}
