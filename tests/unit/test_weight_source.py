"""Weights of a converted folder: what is read, and what is refused before a model is filled."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import converted_folder, qwen3_folder
from support.edited_folder import edit_json
from torch import Tensor
from torch.nn import Parameter

from poweropd_megatron.errors import InputError
from poweropd_megatron.models import hf_weights
from poweropd_megatron.models.families import read_model_config, weights_of
from poweropd_megatron.models.torch_dist_folder import TorchDistFolder
from poweropd_megatron.models.weight_source import open_weights

SETTING = "student.path"
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"num_key_value_heads": 4, "num_attention_heads": 8},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "experts": {"num_key_value_heads": 4} | qwen3_folder.MOE,
    "llama": {"num_key_value_heads": 4} | qwen3_folder.LLAMA,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a converted folder of a small Qwen3."""
    qwen3_folder.write(tmp_path / "hugging-face")
    return converted_folder.write(tmp_path / "hugging-face", tmp_path / "converted")


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_gets_the_same_shards_from_either_folder(
    kind: str, tp_size: int, tmp_path: Path
) -> None:
    qwen3_folder.write(tmp_path / "hugging-face", **KINDS[kind])
    converted_folder.write(tmp_path / "hugging-face", tmp_path / "converted")
    config = read_model_config(tmp_path / "converted", setting=SETTING)
    weights = list(weights_of(config, [1], ep_rank=1, ep_size=2))
    for tp_rank in range(tp_size):
        shards = []
        for name in ("hugging-face", "converted"):
            source = open_weights(config, tmp_path / name, setting=SETTING)
            shards.append(
                [
                    weight.merge(source.read_pieces(weight, tp_rank=tp_rank, tp_size=tp_size))
                    for weight in weights
                ]
            )
        for weight, ours, theirs in zip(weights, *shards, strict=True):
            assert torch.equal(ours, theirs), weight.megatron
            assert not ours.isnan().any()


@pytest.mark.timeout(30)
def test_a_billion_layers_are_refused_without_naming_them(folder: Path) -> None:
    edit_json(folder.parent / "hugging-face", "config.json", num_hidden_layers=10**9)
    config = read_model_config(folder.parent / "hugging-face", setting=SETTING)
    problem = r"config\.json describes 1000000000 layers, but all the folder has is 25 tensors$"
    with pytest.raises(InputError, match=rf"^{SETTING}: .*{problem}"):
        open_weights(config, folder.parent / "hugging-face", setting=SETTING)


def remove(key: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda stored: stored.pop(key)


def put(key: str, *shape: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda stored: stored.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (remove("decoder.final_layernorm.weight"), r"lacks decoder\.final_layernorm\.weight$"),
        (
            put("decoder.layers.mlp.linear_fc1.bias", 2, 160),
            r"has, beyond that, decoder\.layers\.mlp\.linear_fc1\.bias$",
        ),
        (
            put("optimizer.state.exp_avg.output_layer.weight", 53, 48),
            r"has, beyond that, optimizer\.state\.exp_avg\.output_layer\.weight$",
        ),
        (
            put("output_layer.weight", 64, 48),
            r"output_layer\.weight has the shape \(64, 48\), but config\.json implies \(53, 48\)$",
        ),
        (
            put("decoder.layers.mlp.linear_fc2.weight", 3, 48, 80),
            r"linear_fc2\.weight has the shape \(3, 48, 80\), but config\.json implies \(2, 48, 80",
        ),
        (
            put("decoder.layers.0.mlp.linear_fc2.weight", 48, 80),
            "stores each layer by itself, .* expected all layers in one tensor$",
        ),
    ],
    ids=["missing", "unexpected", "optimizer", "padded", "layers", "each layer"],
)
def test_other_tensors_than_config_json_implies_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], Any], problem: str, folder: Path
) -> None:
    stored = converted_folder.global_tensors(folder.parent / "hugging-face")
    change(stored)
    converted_folder.write_weights(folder / "weights", stored)
    config = read_model_config(folder, setting=SETTING)
    with pytest.raises(InputError, match=rf"^{SETTING}: .*{problem}"):
        open_weights(config, folder, setting=SETTING)


def test_objects_that_hold_no_weights_are_passed_over_and_others_refused(folder: Path) -> None:
    stored: dict[str, Any] = converted_folder.global_tensors(folder.parent / "hugging-face")
    stored["decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"] = b""
    stored["common_state/shard_0_1"] = b""
    config = read_model_config(folder, setting=SETTING)
    converted_folder.write_weights(folder / "weights", stored)
    open_weights(config, folder, setting=SETTING)
    stored["rng_state/shard_0_1"] = b""
    converted_folder.write_weights(folder / "weights", stored)
    with pytest.raises(InputError, match=r"has, beyond that, rng_state/shard_0_1$"):
        open_weights(config, folder, setting=SETTING)


def unpickleable(path: Path) -> None:
    path.write_bytes(pickle.dumps(1)[:-1])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: (path / ".metadata").unlink(), r"weights/\.metadata is missing; expected a"),
        (lambda path: unpickleable(path / ".metadata"), r"weights/\.metadata can't be read: "),
        (lambda path: (path / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing, where .* is$"),
        (
            lambda path: os.truncate(path / "__0_0.distcp", 5000),
            r"__0_0\.distcp was not written completely: .* is cut off$",
        ),
        (
            lambda path: (path.parent / "model.safetensors").touch(),
            r"holds both \*\.safetensors and weights/: remove one$",
        ),
    ],
    ids=["no metadata", "cut metadata", "no file", "cut file", "two kinds"],
)
def test_an_incomplete_folder_is_refused_with_the_file(
    damage: Callable[[Path], Any], problem: str, folder: Path
) -> None:
    config = read_model_config(folder, setting=SETTING)
    damage(folder / "weights")
    with pytest.raises(InputError, match=rf"^{SETTING}: .*{problem}"):
        open_weights(config, folder, setting=SETTING)


def test_bytes_that_are_no_tensor_are_refused_with_tensor_and_file(folder: Path) -> None:
    config = read_model_config(folder, setting=SETTING)
    file = folder / "weights" / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    source = open_weights(config, folder, setting=SETTING)
    weight = next(weights_of(config, [0]))
    with pytest.raises(InputError, match=rf"word_embeddings\.weight can't be read from {file}: "):
        source.read_pieces(weight, tp_rank=0, tp_size=1)


def test_a_nan_is_refused_by_the_names_of_the_tensors(folder: Path) -> None:
    stored = converted_folder.global_tensors(folder.parent / "hugging-face")
    stored["decoder.layers.mlp.linear_fc1.weight"][1, 3, 3] = torch.nan
    converted_folder.write_weights(folder / "weights", stored)
    config = read_model_config(folder, setting=SETTING)
    parameters = {
        row.megatron: Parameter(torch.empty(row.shape)) for row in weights_of(config, [0, 1])
    }
    with pytest.raises(
        InputError,
        match=r"layers\.1\.mlp\.gate_proj\.weight \+ .*layers\.1\.mlp\.up_proj\.weight has NaN",
    ):
        hf_weights.load(
            parameters.items(),
            weights_of(config, [0, 1]),
            open_weights(config, folder, setting=SETTING),
            tp_rank=0,
            tp_size=1,
        )


def test_gaps_between_the_pieces_of_a_tensor_are_found(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(4, 3)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.state_dict_metadata["a"].size = torch.Size([5, 3])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    source = TorchDistFolder(tmp_path, setting=SETTING)
    assert torch.equal(source.read("a", (3,)), torch.ones(3))
    with pytest.raises(InputError, match=rf"^{SETTING}: {tmp_path} holds only parts of a\[4\]$"):
        source.read("a", (4,))
