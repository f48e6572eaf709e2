"""Hugging Face -> Megatron -> Hugging Face gives back every bit; between lie global tensors."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import converted_folder, qwen3_folder
from support.benchmark_run import REPO
from torch import Tensor

from poweropd_megatron.checkpoint.store import read_manifest, verify
from poweropd_megatron.cli.main import main
from poweropd_megatron.conversion import dist_items
from poweropd_megatron.conversion.to_hugging_face import to_hugging_face
from poweropd_megatron.conversion.to_megatron import to_megatron
from poweropd_megatron.models.torch_dist_folder import TorchDistFolder

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"num_hidden_layers": 3},
    "experts": {**qwen3_folder.MOE, "num_key_value_heads": 1},
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
}


def write_bits(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, num_files: int = 2, **changes: Any
) -> dict[str, Tensor]:
    """Write a model whose tensors are random bits: NaN with payloads, -0.0, subnormals, inf."""
    tensors = qwen3_folder.write(folder, spelling="transformers-5", **changes)
    if changes.get("model_type") == "llama":
        tensors = {name: tensor for name, tensor in tensors.items() if "q_norm" not in name}
        tensors = {name: tensor for name, tensor in tensors.items() if "k_norm" not in name}
    (folder / "model.safetensors").unlink()
    generator = torch.Generator().manual_seed(7)
    integers = torch.int16 if dtype == torch.bfloat16 else torch.int32
    limits = torch.iinfo(integers)
    tensors = {
        name: torch.randint(
            limits.min, limits.max, tensor.shape, dtype=integers, generator=generator
        ).view(dtype)
        for name, tensor in tensors.items()
    }
    qwen3_folder.write_tensors(folder, tensors, num_files=num_files)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.svg").write_text("<svg/>")
    return tensors


def read(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_gives_back_every_bit(name, num_workers, tmp_path, monkeypatch):
    # Small pieces, so that tensors are cut within heads, halves and experts.
    monkeypatch.setattr(dist_items, "MAX_ITEM_BYTES", 1000)
    tensors = write_bits(tmp_path / "hf", **MODELS[name])
    to_megatron(tmp_path / "hf", tmp_path / "megatron", num_workers=num_workers)
    to_hugging_face(
        tmp_path / "megatron", tmp_path / "back", reference=tmp_path / "hf", num_workers=num_workers
    )
    assert_same_bits(read(tmp_path / "back"), tensors)
    for path in (tmp_path / "hf").rglob("*"):
        again = tmp_path / "back" / path.relative_to(tmp_path / "hf")
        if path.suffix == ".safetensors":
            assert load_file(again).keys() == load_file(path).keys()
        elif path.is_file() and path.name not in ("config.json", "model.safetensors.index.json"):
            assert again.read_bytes() == path.read_bytes()
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    expected_index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == expected_index["weight_map"]
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == num_bytes
    before = json.loads((tmp_path / "hf" / "config.json").read_text())
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert after == before | {"dtype": "bfloat16"}


@pytest.mark.parametrize("name", MODELS)
def test_the_checkpoint_holds_the_tables_global_tensors(name, tmp_path):
    write_bits(tmp_path / "hf", num_files=1, **MODELS[name])
    expected = converted_folder.global_tensors(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    stored = TorchDistFolder(tmp_path / "megatron" / "weights", setting="test")
    assert stored.shapes() == {key: tuple(tensor.shape) for key, tensor in expected.items()}
    assert_same_bits({key: stored.read(key) for key in expected}, expected)
    verify(tmp_path / "megatron" / "weights")
    files = {path.name for path in (tmp_path / "megatron" / "weights").iterdir()}
    assert set(read_manifest(tmp_path / "megatron" / "weights")) == files - {"manifest.json"}
    assert not list(tmp_path.glob(".*"))


def test_queries_keys_and_values_are_grouped_by_head_and_halves_by_layer(tmp_path):
    """Against indices written out by hand, not the table."""
    tensors = write_bits(tmp_path / "hf", **MODELS["untied"])
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    stored = TorchDistFolder(tmp_path / "megatron" / "weights", setting="test")
    query, key, value = (
        tensors[f"model.layers.1.self_attn.{name}_proj.weight"].view(torch.int16) for name in "qkv"
    )
    merged = stored.read("decoder.layers.self_attention.linear_qkv.weight", (1,)).view(torch.int16)
    for group in range(2):
        rows = merged[group * 64 : (group + 1) * 64]
        assert torch.equal(rows[:32], query[group * 32 : (group + 1) * 32])
        assert torch.equal(rows[32:48], key[group * 16 : (group + 1) * 16])
        assert torch.equal(rows[48:], value[group * 16 : (group + 1) * 16])
    fc1 = stored.read("decoder.layers.mlp.linear_fc1.weight", (2,)).view(torch.int16)
    gate, up = (
        tensors[f"model.layers.2.mlp.{name}_proj.weight"].view(torch.int16)
        for name in ("gate", "up")
    )
    assert torch.equal(fc1[:80], gate)
    assert torch.equal(fc1[80:], up)


def test_a_tied_head_that_the_reference_stores_is_stored_again(tmp_path):
    tensors = write_bits(tmp_path / "hf", num_files=1, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    qwen3_folder.write_tensors(tmp_path / "hf", tensors)
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", reference=tmp_path / "hf")
    assert_same_bits(read(tmp_path / "back"), tensors)
    to_hugging_face(tmp_path / "megatron", tmp_path / "alone")
    del tensors["lm_head.weight"]
    assert_same_bits(read(tmp_path / "alone"), tensors)


def test_the_references_index_is_enough(tmp_path):
    tensors = write_bits(tmp_path / "hf", num_files=3)
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    for path in (tmp_path / "hf").glob("*.safetensors"):
        path.unlink()
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", reference=tmp_path / "hf")
    assert_same_bits(read(tmp_path / "back"), tensors)
    assert len(list((tmp_path / "back").glob("*-of-00003.safetensors"))) == 3


def test_files_are_closed_before_they_exceed_the_size_that_is_asked_for(tmp_path):
    tensors = write_bits(tmp_path / "hf", num_files=3)
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    to_hugging_face(
        tmp_path / "megatron",
        tmp_path / "back",
        reference=tmp_path / "hf",
        max_shard_bytes=25_000,
        num_workers=2,
    )
    assert_same_bits(read(tmp_path / "back"), tensors)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in files]
    assert max(sizes) <= 25_000
    assert all(one + other > 20_000 for one, other in pairwise(sizes))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_fp32_holds_bf16_exactly_and_back(num_workers, tmp_path):
    tensors = qwen3_folder.write(tmp_path / "hf", num_files=2)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    to_megatron(tmp_path / "hf", tmp_path / "bf16", dtype=torch.bfloat16, num_workers=num_workers)
    assert json.loads((tmp_path / "bf16/config.json").read_text())["torch_dtype"] == "bfloat16"
    to_hugging_face(tmp_path / "bf16", tmp_path / "back", dtype=torch.float32)
    assert_same_bits(
        read(tmp_path / "back"), {name: tensor.float() for name, tensor in rounded.items()}
    )
    to_megatron(tmp_path / "back", tmp_path / "fp32")
    to_hugging_face(tmp_path / "fp32", tmp_path / "again", dtype=torch.bfloat16)
    assert_same_bits(read(tmp_path / "again"), rounded)


def test_tensors_of_several_types_keep_theirs(tmp_path):
    tensors = write_bits(tmp_path / "hf", num_files=1, **MODELS["experts"])
    tensors = {
        name: tensor.float() if "mlp.gate." in name or "model.norm" in name else tensor
        for name, tensor in tensors.items()
    }
    qwen3_folder.write_tensors(tmp_path / "hf", tensors)
    to_megatron(tmp_path / "hf", tmp_path / "megatron", num_workers=2)
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", num_workers=2)
    assert_same_bits(read(tmp_path / "back"), tensors)


@pytest.mark.parametrize("name", ["hf_to_megatron", "megatron_to_hf"])
def test_the_scripts_of_a_checkout_are_the_commands_and_tell_about_them_without_torch(name):
    told = subprocess.run(
        [sys.executable, "-X", "importtime", f"checkpoints_tools/{name}.py", "--help"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0
    assert "--workers" in told.stdout
    assert not re.search(r"\b(torch|numpy|safetensors)\b", told.stderr)


def test_the_command_converts_there_and_back(tmp_path, capsys):
    tensors = write_bits(tmp_path / "hf")
    folders = [str(tmp_path / name) for name in ("hf", "megatron", "back")]
    places = ["--input", folders[0], "--output", folders[1], "--workers", "1"]
    assert main(["convert", "to-megatron", *places]) == 0
    places = ["--input", folders[1], "--output", folders[2], "--max-shard-size", "1GB"]
    assert main(["convert", "to-hf", *places, "--reference", folders[0], "--workers", "2"]) == 0
    assert capsys.readouterr().out.split() == folders[1:]
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), tensors)
