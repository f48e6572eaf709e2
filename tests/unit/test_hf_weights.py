"""Hugging Face -> Megatron -> Hugging Face is bitwise the identity for any tensor-parallel size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import qwen3_folder
from torch import Tensor
from torch.nn import Parameter

from poweropd_megatron.errors import InputError
from poweropd_megatron.models import hf_weights
from poweropd_megatron.models.build import build_model, padded_vocab_size
from poweropd_megatron.models.families import read_model_config, weights_of
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.weight_source import open_weights
from poweropd_megatron.parallel.layout import Layout

SETTING = "student.path"
CUT_ALONG = {
    "word_embeddings": 0,
    "output_layer": 0,
    "linear_qkv": 0,
    "linear_fc1": 0,
    "linear_proj": 1,
    "linear_fc2": 1,
}
"""Megatron's column-parallel layers are cut along their rows, row-parallel ones along columns."""


def read_config(folder: Path) -> ModelConfig:
    return read_model_config(folder, setting=SETTING)


def shard_shape(name: str, whole: Parameter, config: ModelConfig, tp_size: int) -> list[int]:
    """Return the shape of a rank's shard of a parameter that has the shape of `whole` at TP 1."""
    shape = list(whole.shape)
    if shape[0] == config.vocab_size:
        shape[0] = padded_vocab_size(config.vocab_size, tp_size)
    for layer, dim in CUT_ALONG.items():
        if layer in name and "experts" not in name:
            assert shape[dim] % tp_size == 0
            shape[dim] //= tp_size
    return shape


def load_shards(
    folder: Path, layout: Layout, tp_size: int
) -> tuple[dict[str, Parameter], list[dict[str, Parameter]]]:
    """Return the parameters of the model at TP 1, and of each rank at `tp_size`."""
    config = read_config(folder)
    [chunk] = build_model(config, layout, folder=str(folder), dtype="fp32", setting=SETTING)
    whole = dict(chunk.named_parameters())
    ranks = []
    for tp_rank in range(tp_size):
        shards = {
            name: Parameter(torch.full(shard_shape(name, parameter, config, tp_size), torch.nan))
            for name, parameter in whole.items()
        }
        hf_weights.load(
            shards.items(),
            weights_of(config, range(config.num_layers)),
            open_weights(config, folder, setting=SETTING),
            tp_rank=tp_rank,
            tp_size=tp_size,
        )
        ranks.append(shards)
    return whole, ranks


def back(config: ModelConfig, ranks: list[dict[str, Parameter]]) -> Iterator[tuple[str, Tensor]]:
    for weight in weights_of(config, range(config.num_layers)):
        if weight.megatron in ranks[0]:
            shards = [rank[weight.megatron].data for rank in ranks]
            yield from hf_weights.to_hugging_face(weight, shards, vocab_size=config.vocab_size)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4, "num_attention_heads": 8},
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 56},
        {"num_key_value_heads": 4, "vocab_size": 5, "num_hidden_layers": 1},
        {"num_key_value_heads": 4, "num_hidden_layers": 1} | qwen3_folder.MOE,
        {"num_key_value_heads": 1, "num_hidden_layers": 1},
        {"num_key_value_heads": 2, "num_attention_heads": 12, "num_hidden_layers": 1},
    ],
    ids=[
        *("grouped heads", "tied", "a rank without vocabulary", "experts"),
        *("ranks share a head", "ranks share heads"),
    ],
)
def test_a_round_trip_through_shards_is_bitwise(
    tmp_path: Path, layout: Layout, changes: dict[str, Any], tp_size: int
) -> None:
    tensors = qwen3_folder.write(tmp_path, **changes)
    _, ranks = load_shards(tmp_path, layout, tp_size)
    returned = list(back(read_config(tmp_path), ranks))
    assert sorted(name for name, _ in returned) == sorted(tensors)
    for name, tensor in returned:
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_shards_hold_the_rows_that_megatron_gives_their_rank(
    tmp_path: Path, layout: Layout, tp_size: int, num_key_value_heads: int
) -> None:
    tensors = qwen3_folder.write(
        tmp_path, num_key_value_heads=num_key_value_heads, num_attention_heads=8
    )
    whole, ranks = load_shards(tmp_path, layout, tp_size)
    for rank, shards in enumerate(ranks):
        for name, shard in shards.items():
            dim = next((dim for layer, dim in CUT_ALONG.items() if layer in name), None)
            if "linear_fc1" in name:
                mlp = name.replace("decoder", "model").replace("linear_fc1", "{}_proj")
                gate, up = (
                    tensors[mlp.format(part)].chunk(tp_size)[rank] for part in ("gate", "up")
                )
                assert torch.equal(shard.data, torch.cat([gate, up]))
            elif dim is None:
                assert torch.equal(shard, whole[name])
            else:
                rows = torch.nn.functional.pad(
                    whole[name].data, (0, 0, 0, -whole[name].shape[0] % tp_size)
                )
                assert torch.equal(shard.data, rows.chunk(tp_size, dim=dim)[rank])


def test_rows_of_qkv_are_each_key_heads_queries_then_its_key_and_value(
    tmp_path: Path, layout: Layout
) -> None:
    tensors = qwen3_folder.write(tmp_path)
    whole, _ = load_shards(tmp_path, layout, 1)
    query, key, value = (
        tensors[f"model.layers.1.self_attn.{name}_proj.weight"].split(16) for name in "qkv"
    )
    expected = [query[0], query[1], key[0], value[0], query[2], query[3], key[1], value[1]]
    loaded = whole["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert torch.equal(loaded.data, torch.cat(expected))


def test_rows_that_pad_the_vocabulary_are_zero(tmp_path: Path, layout: Layout) -> None:
    tensors = qwen3_folder.write(tmp_path, num_key_value_heads=4)
    _, ranks = load_shards(tmp_path, layout, 4)
    embedding = torch.cat([rank["embedding.word_embeddings.weight"].data for rank in ranks])
    assert torch.equal(embedding[:53], tensors["model.embed_tokens.weight"])
    assert embedding.shape[0] == 56
    assert not embedding[53:].any()


def test_bf16_weights_come_back_bitwise(tmp_path: Path, layout: Layout) -> None:
    tensors = qwen3_folder.write(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    qwen3_folder.write_tensors(tmp_path, tensors)
    config = read_config(tmp_path)
    [chunk] = build_model(config, layout, folder=str(tmp_path), dtype="bf16", setting=SETTING)
    for name, tensor in back(config, [dict(chunk.named_parameters())]):
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (52, 48)),
        ("model.embed_tokens.weight", (54, 48)),
        ("lm_head.weight", (53, 40)),
        ("model.norm.weight", (40,)),
        ("model.norm.weight", (48, 1)),
        ("model.layers.1.input_layernorm.weight", (49,)),
        ("model.layers.0.self_attn.q_proj.weight", (60, 48)),
        ("model.layers.0.self_attn.q_proj.weight", (128, 48)),
        ("model.layers.0.self_attn.k_proj.weight", (64, 48)),
        ("model.layers.0.self_attn.v_proj.weight", (32, 40)),
        ("model.layers.0.self_attn.v_proj.weight", (32,)),
        ("model.layers.0.self_attn.q_norm.weight", (1,)),
        ("model.layers.1.self_attn.o_proj.weight", (48, 60)),
        ("model.layers.1.self_attn.o_proj.weight", (48,)),
        ("model.layers.1.mlp.gate_proj.weight", (72, 48)),
        ("model.layers.1.mlp.down_proj.weight", (48, 80, 1)),
    ],
    ids=str,
)
def test_a_tensor_of_another_shape_is_refused_by_name(
    tmp_path: Path, layout: Layout, name: str, shape: tuple[int, ...], tp_size: int
) -> None:
    tensors = qwen3_folder.write(tmp_path)
    config = read_config(tmp_path)
    [chunk] = build_model(config, layout, folder=str(tmp_path), dtype="fp32", setting=SETTING)
    tensors[name] = torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    parameters = {
        name: Parameter(torch.empty(shard_shape(name, parameter, config, tp_size)))
        for name, parameter in chunk.named_parameters()
    }
    with pytest.raises(InputError, match=rf"^{SETTING}: .*{name}.* config\.json"):
        hf_weights.load(
            parameters.items(),
            weights_of(config, range(config.num_layers)),
            open_weights(config, tmp_path, setting=SETTING),
            tp_rank=0,
            tp_size=tp_size,
        )


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.k_norm.weight"]
)
def test_a_missing_tensor_is_named_when_the_model_is_built(
    tmp_path: Path, layout: Layout, name: str
) -> None:
    tensors = qwen3_folder.write(tmp_path)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"^{SETTING}: .* but {tmp_path} lacks {name}$"):
        build_model(
            read_config(tmp_path), layout, folder=str(tmp_path), dtype="fp32", setting=SETTING
        )


def test_a_parameter_without_a_row_in_the_table_is_refused(tmp_path: Path) -> None:
    qwen3_folder.write(tmp_path)
    config = read_config(tmp_path)
    with pytest.raises(InputError, match=r"no Hugging Face tensor is known for decoder\.bias"):
        hf_weights.load(
            [("decoder.bias", Parameter(torch.zeros(3)))],
            weights_of(config, [0, 1]),
            open_weights(config, tmp_path, setting=SETTING),
            tp_rank=0,
            tp_size=1,
        )


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_a_rank_reads_its_own_experts_whole_and_gives_them_back(
    tmp_path: Path, ep_size: int
) -> None:
    tensors = qwen3_folder.write(tmp_path, **qwen3_folder.MOE)
    config = read_config(tmp_path)
    source = open_weights(config, tmp_path, setting=SETTING)
    returned: dict[str, Tensor] = {}
    for ep_rank in range(ep_size):
        weights = list(weights_of(config, [0, 1], ep_rank=ep_rank, ep_size=ep_size))
        experts = [weight for weight in weights if weight.is_expert]
        assert len(experts) == 2 * 2 * 4 // ep_size
        shards = {
            weight.megatron: Parameter(
                torch.full((48, 48) if "fc1" in weight.megatron else (48, 24), torch.nan)
            )
            for weight in experts
        }
        hf_weights.load(shards.items(), weights, source, tp_rank=1, tp_size=2)
        for weight in experts:
            shard = shards[weight.megatron].data
            returned |= dict(hf_weights.to_hugging_face(weight, [shard], vocab_size=53))
    expected = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    assert returned.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in returned.items())


def test_a_pipeline_stage_reads_its_own_layers(tmp_path: Path) -> None:
    tensors = qwen3_folder.write(tmp_path, num_hidden_layers=3)
    config = read_config(tmp_path)
    name = "decoder.layers.{}.self_attention.linear_proj.weight"
    shards = {name.format(local): Parameter(torch.empty(48, 64)) for local in (0, 1)}
    hf_weights.load(
        shards.items(),
        weights_of(config, [1, 2]),
        open_weights(config, tmp_path, setting=SETTING),
        tp_rank=0,
        tp_size=1,
    )
    for local, layer in ((0, 1), (1, 2)):
        expected = tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
        assert torch.equal(shards[name.format(local)].data, expected)
