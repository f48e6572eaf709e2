"""The table of each family against what Megatron stores and what a folder holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from support import qwen3_folder

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.build import build_model
from poweropd_megatron.models.families import (
    FAMILIES,
    hugging_face_shapes,
    read_model_config,
    stored_tensors,
    weights_of,
)
from poweropd_megatron.parallel.layout import Layout

SETTING = "student.path"
CASES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3, tied": {"tie_word_embeddings": True},
    "qwen3_moe": qwen3_folder.MOE | {"num_hidden_layers": 3},
    "llama": qwen3_folder.LLAMA,
    "llama, tied": qwen3_folder.LLAMA | {"tie_word_embeddings": True},
}


def test_each_family_has_a_case() -> None:
    assert {name.split(",")[0] for name in CASES} == FAMILIES.keys()


@pytest.mark.parametrize("case", CASES)
def test_the_stored_tensors_are_those_that_megatron_saves(
    case: str, tmp_path: Path, layout: Layout
) -> None:
    """Key by key with their global shapes, so a file of them loads into any layout."""
    qwen3_folder.write(tmp_path, **CASES[case])
    config = read_model_config(tmp_path, setting=SETTING)
    [chunk] = build_model(config, layout, folder=str(tmp_path), dtype="fp32", setting=SETTING)
    megatrons: dict[str, tuple[int, ...]] = {}
    for name, value in chunk.sharded_state_dict().items():
        if name.endswith("_extra_state"):
            continue
        for shard in value.build() if isinstance(value, ShardedTensorFactory) else [value]:
            megatrons[shard.key] = tuple(shard.global_shape)
    ours = list(stored_tensors(config))
    assert len({tensor.key for tensor in ours}) == len(ours)
    assert {tensor.key: tensor.shape for tensor in ours} == megatrons


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_the_stored_tensors_are_the_folders_tensors_each_once(
    case: str, tmp_path: Path
) -> None:
    tensors = qwen3_folder.write(tmp_path, **CASES[case])
    config = read_model_config(tmp_path, setting=SETTING)
    assert hugging_face_shapes(config) == {n: tuple(t.shape) for n, t in tensors.items()}
    seen: dict[str, torch.Tensor] = {}
    for stored in stored_tensors(config):
        parts = list(stored.parts())
        assert [index for index, _ in parts] == sorted(index for index, _ in parts)
        whole = torch.full(stored.shape, torch.nan)
        for index, weight in parts:
            whole[index] = weight.merge([tensors[name] for name in weight.hugging_face])
        assert not whole.isnan().any()
        for index, weight in parts:
            pieces = zip(weight.hugging_face, weight.split(whole[index]), strict=True)
            assert not seen.keys() & set(weight.hugging_face)
            seen |= dict(pieces)
    assert seen.keys() == tensors.keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("case", CASES)
def test_the_rows_are_the_parameters_of_the_model(
    case: str, tmp_path: Path, layout: Layout
) -> None:
    qwen3_folder.write(tmp_path, **CASES[case])
    config = read_model_config(tmp_path, setting=SETTING)
    [chunk] = build_model(config, layout, folder=str(tmp_path), dtype="fp32", setting=SETTING)
    parameters = {name: tuple(value.shape) for name, value in chunk.named_parameters()}
    rows = {row.megatron: row for row in weights_of(config, range(config.num_layers))}
    copies = {name for name, row in rows.items() if row.is_copy}
    assert copies == ({"output_layer.weight"} if config.tie_word_embeddings else set())
    assert {name: row.shape for name, row in rows.items() if name not in copies} == parameters


def write_llama(folder: Path, **changes: Any) -> None:
    config = {**qwen3_folder.SMALL, **qwen3_folder.LLAMA, **changes}
    given = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(given))


def test_what_an_old_llama_leaves_out_is_what_it_could_not_choose(tmp_path: Path) -> None:
    write_llama(tmp_path, head_dim=None, num_key_value_heads=None, rope_theta=None)
    config = read_model_config(tmp_path, setting=SETTING)
    assert (config.kv_channels, config.num_query_groups) == (12, 4)
    assert (config.rotary_base, config.qk_layernorm) == (10000.0, False)


def test_a_llama_says_its_heads_and_rotary_base_in_either_spelling(tmp_path: Path) -> None:
    write_llama(
        tmp_path, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 7}
    )
    config = read_model_config(tmp_path, setting=SETTING)
    assert (config.kv_channels, config.num_query_groups, config.rotary_base) == (16, 2, 7.0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ": rope_type = 'llama3' is not"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ": partial_rotary_factor = 0.5 is not supported",
        ),
        ({"attention_bias": True}, ": attention_bias = True is not supported"),
        ({"mlp_bias": True}, ": mlp_bias = True is not supported"),
        ({"rope_interleaved": True}, ": rope_interleaved = True is not supported"),
        ({"hidden_act": "gelu"}, ": hidden_act = 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, ": quantization_config = .* is not supported"),
        ({"head_dim": None, "hidden_size": 50}, ": has no head_dim, and hidden_size = 50 is no"),
        ({"head_dim": 0}, ": head_dim is 0, expected an integer above 0"),
        ({"num_key_value_heads": "2"}, ": num_key_value_heads is '2', expected an integer above 0"),
        ({"rope_theta": 0}, ": rope_theta is 0, expected a finite number above 0"),
    ],
    ids=str,
)
def test_what_is_not_modelled_of_a_llama_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    write_llama(tmp_path, **changes)
    with pytest.raises(InputError, match=rf"^{SETTING}: {tmp_path}/config.json{problem}"):
        read_model_config(tmp_path, setting=SETTING)
