"""Where a model's weights come from: a Hugging Face folder, or one converted for Megatron.

A converted folder holds config.json, the tokenizer and whatever else the Hugging Face folder had
but weights, and these under weights/: a torch_dist checkpoint of global tensors, with its
manifest.json.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from torch import Tensor

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families import (
    check_num_layers,
    hugging_face_shapes,
    stored_tensors,
)
from poweropd_megatron.models.families.weight import Weight
from poweropd_megatron.models.hf_folder import HFFolder
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.torch_dist_folder import TorchDistFolder

WEIGHTS_NAME = "weights"
OF_EACH_LAYER = re.compile(r"decoder\.layers\.\d+\.")
_HARMLESS = re.compile(r"common_state/.*|.*\._extra_state/.*")
"""Objects that Megatron stores beside weights, and that hold none."""


class WeightSource(Protocol):
    """A folder that gives a rank its pieces of the tensors of a table's rows."""

    setting: str

    def read_pieces(self, weight: Weight, *, tp_rank: int, tp_size: int) -> list[Tensor]:
        """Return what a rank holds of each of the row's Hugging Face tensors.

        Raises: InputError if a tensor has another shape than the row's, or can't be read.
        """


def is_converted(folder: str | Path) -> bool:
    """Return whether a folder holds weights that were converted for Megatron."""
    return (Path(folder) / WEIGHTS_NAME).is_dir()


def open_weights(config: ModelConfig, folder: str | Path, *, setting: str) -> WeightSource:
    """Return the weights in a folder, whose names are exactly those that its config.json implies.

    Raises: InputError if there are none, or tensors are missing or unexpected.
    Cost: reads index and metadata, no weights.
    """
    if not is_converted(folder):
        return HuggingFaceWeights(config, HFFolder(folder, setting=setting))
    if any(Path(folder).glob("*.safetensors")):
        raise InputError(
            f"{setting}: {folder} holds both *.safetensors and {WEIGHTS_NAME}/: remove one"
        )
    return MegatronWeights(config, TorchDistFolder(Path(folder) / WEIGHTS_NAME, setting=setting))


class HuggingFaceWeights:
    """Weights in *.safetensors, of which only the slices that a rank holds are read."""

    def __init__(self, config: ModelConfig, folder: HFFolder) -> None:
        self.setting = folder.setting
        self._folder = folder
        check_num_layers(config, len(folder.names()), folder.path, setting=folder.setting)
        found = folder.names() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
        _check_names(config, folder, found, hugging_face_shapes(config).keys())

    def read_pieces(self, weight: Weight, *, tp_rank: int, tp_size: int) -> list[Tensor]:
        """Return what a rank holds of each tensor. Raises: InputError."""
        pieces = []
        for name, expected in zip(weight.hugging_face, weight.shapes, strict=True):
            shape = self._folder.shape(name)
            if shape != expected:
                raise _other_shape(self.setting, name, shape, expected)
            if weight.dim is None:
                pieces.append(self._folder.read(name))
            else:
                start, length = _share(shape[weight.dim], tp_rank, tp_size)
                pieces.append(self._folder.read(name, dim=weight.dim, start=start, length=length))
        return pieces


class MegatronWeights:
    """Weights in a torch_dist folder, of which a rank reads its layers and experts.

    They are taken apart into Hugging Face's tensors, of which the rank takes its slices: the halves
    of a gated MLP, and the heads of queries, keys and values, are cut each for itself.
    """

    def __init__(self, config: ModelConfig, folder: TorchDistFolder) -> None:
        self.setting = folder.setting
        self._folder = folder
        found = folder.shapes()
        if any(OF_EACH_LAYER.match(key) for key in found):
            raise InputError(
                f"{folder.setting}: {folder.path} stores each layer by itself, as Megatron "
                "does with moe_layer_freq as a list; expected all layers in one tensor"
            )
        expected = {stored.key: stored.shape for stored in stored_tensors(config)}
        others = {key for key in folder.objects() if not _HARMLESS.fullmatch(key)}
        _check_names(config, folder, found.keys() | others, expected.keys())
        for key, shape in expected.items():
            if found[key] != shape:
                raise _other_shape(self.setting, key, found[key], shape)

    def read_pieces(self, weight: Weight, *, tp_rank: int, tp_size: int) -> list[Tensor]:
        """Return what a rank holds of each tensor. Raises: InputError."""
        pieces = weight.split(self._folder.read(weight.stored, weight.index))
        if weight.dim is None:
            return list(pieces)
        return [
            piece.narrow(weight.dim, *_share(piece.shape[weight.dim], tp_rank, tp_size))
            for piece in pieces
        ]


def _share(size: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """Return start and length of a rank's slice; the last get less where TP doesn't divide."""
    share = -(-size // tp_size)
    start = min(tp_rank * share, size)
    return start, min(share, size - start)


def _other_shape(
    setting: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> InputError:
    return InputError(
        f"{setting}: {name} has the shape {shape}, but config.json implies {expected}"
    )


def _check_names(
    config: ModelConfig,
    folder: HFFolder | TorchDistFolder,
    found: Collection[str],
    expected: Collection[str],
) -> None:
    """Refuse a folder whose tensors are not those of its config.json, such as other layers."""
    experts = f" of {config.experts.num_moe_experts} experts" if config.experts else ""
    lacking, beyond = set(expected) - set(found), set(found) - set(expected)
    for names, what in ((lacking, "lacks"), (beyond, "has, beyond that,")):
        if names:
            raise InputError(
                f"{folder.setting}: config.json describes {config.num_layers} layers{experts}, "
                f"but {folder.path} {what} {', '.join(sorted(names)[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            )
