"""Weights of a folder into shards and back: bitwise, in every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gathering import whole_tensors
from safetensors.torch import load_file
from support import converted_folder, qwen3_folder
from support.rank_pool import RankPool
from torch import Tensor

from poweropd_megatron.config.pipeline import EMBEDDING, FIRST, LAST, LOSS, check_pipeline
from poweropd_megatron.config.schema import DType, ParallelConfig
from poweropd_megatron.models.build import build_model, layer_numbers
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import student_layout

CONVERTED = {
    "TP2xPP2xVPP2": ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
    ),
    "TP2xEP2": ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2),
    "PP2xEP2": ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
}
LAYOUTS = {
    "one-process": (1, 1, 1, None),
    "TP2": (2, 2, 1, None),
    "TP4": (4, 4, 1, None),
    "PP2": (2, 1, 2, None),
    "TP2xPP2": (4, 2, 2, None),
    "PP4": (4, 1, 4, None),
    "PP2xVPP2": (2, 1, 2, 2),
    "TP2xPP2xVPP2": (4, 2, 2, 2),
}
DEALT_OUT: list[tuple[int, int, int | None, dict[str, Any], list[list[list[int]]]]] = [
    (5, 2, None, {LOSS: True}, [[[0, 1, 2]], [[3, 4]]]),
    (5, 2, None, {EMBEDDING: True}, [[[0, 1]], [[2, 3, 4]]]),
    (5, 4, None, {FIRST: 2}, [[[0, 1]], [[2]], [[3]], [[4]]]),
    (5, 4, None, {LAST: 2}, [[[0]], [[1]], [[2]], [[3, 4]]]),
    (5, 3, None, {FIRST: 1, LAST: 1}, [[[0]], [[1, 2, 3]], [[4]]]),
    (6, 2, 3, {}, [[[0], [2], [4]], [[1], [3], [5]]]),
    (6, 2, 2, {FIRST: 4}, [[[0, 1], [3, 4]], [[2], [5]]]),
    (6, 2, 2, {EMBEDDING: True, LOSS: True}, [[[0], [3, 4]], [[1, 2], [5]]]),
]
"""Layers, stages, chunks a stage, settings; and the layers of each chunk of each stage."""


def load_and_gather(
    parallel: ParallelConfig, folder: str, dtype: DType, **megatron: Any
) -> tuple[dict[str, list[Tensor]], list[list[int]]]:
    """Return every copy of each tensor, and the layers of this rank's chunks."""
    cpu_device.install()
    layout = student_layout(parallel, torch.device("cpu"), seed=1)
    model = read_model_config(folder, setting="student.path")
    chunks = build_model(
        model, layout, folder=folder, dtype=dtype, setting="student.path", megatron=megatron
    )
    whole = whole_tensors(chunks, layout, model, lambda weight: weight)
    return whole, [layer_numbers(chunk) for chunk in chunks]


def dealt_out(
    parallel: ParallelConfig, folder: str, megatron: dict[str, Any]
) -> tuple[dict[str, list[Tensor]], list[list[int]]]:
    return load_and_gather(parallel, folder, "fp32", **megatron)


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_put_together_are_the_folders_tensors_bitwise(
    name: str, embeddings: str, folders: dict[str, str], ranks: RankPool
) -> None:
    world_size, tensor, pipeline, virtual = LAYOUTS[name]
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
    )
    folder = folders[f"student-{embeddings}"]
    original = load_file(Path(folder, "model.safetensors"))
    gathered, _ = ranks.run(load_and_gather, parallel, folder, "fp32", world_size=world_size)[0]
    padding = gathered.pop("padding")
    assert gathered.keys() == original.keys()
    for tensor_name, copies in gathered.items():
        assert all(torch.equal(copy, original[tensor_name]) for copy in copies)
    assert [len(rows) for rows in padding] == [-37 % tensor] * len(padding)
    assert all((rows == 0).all() for rows in padding)


@pytest.mark.parametrize("case", DEALT_OUT, ids=lambda case: "-".join(map(str, case[:3])))
def test_uneven_stages_and_virtual_stages_hold_their_own_layers_weights(
    case: tuple[int, int, int | None, dict[str, Any], list[list[list[int]]]],
    tmp_path: Path,
    ranks: RankPool,
) -> None:
    num_layers, stages, chunks, megatron, expected = case
    original = qwen3_folder.write(tmp_path, num_hidden_layers=num_layers)
    parallel = ParallelConfig(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks
    )
    check_pipeline("student", parallel, megatron, num_layers)
    by_rank = ranks.run(dealt_out, parallel, str(tmp_path), megatron, world_size=stages)
    assert [layers for _, layers in by_rank] == expected
    gathered, _ = by_rank[0]
    gathered.pop("padding")
    assert gathered.keys() == original.keys()
    for name, copies in gathered.items():
        assert all(torch.equal(copy, original[name]) for copy in copies)


def test_shards_in_bf16_are_the_rounded_tensors(folders: dict[str, str], ranks: RankPool) -> None:
    folder = folders["student-untied"]
    original = load_file(Path(folder, "model.safetensors"))
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    gathered, _ = ranks.run(load_and_gather, parallel, folder, "bf16", world_size=2)[0]
    for name, tensor in original.items():
        assert torch.equal(gathered[name][0], tensor.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("TP2xPP2xVPP2", "untied"),
        ("TP2xPP2xVPP2", "llama"),
        ("TP2xEP2", "experts"),
        ("PP2xEP2", "experts"),
    ],
)
def test_shards_of_a_converted_folder_put_together_are_the_first_tensors_bitwise(
    name: str, kind: str, tmp_path: Path, ranks: RankPool
) -> None:
    parallel = CONVERTED[name]
    changes = {"untied": {}, "experts": qwen3_folder.MOE, "llama": qwen3_folder.LLAMA}[kind]
    original = qwen3_folder.write(
        tmp_path / "first", num_hidden_layers=4, tie_word_embeddings=kind == "experts", **changes
    )
    folder = converted_folder.write(tmp_path / "first", tmp_path / "converted")
    world_size = 4 if parallel.pipeline_model_parallel_size > 1 else 2
    by_rank = ranks.run(load_and_gather, parallel, str(folder), "fp32", world_size=world_size)
    gathered, _ = by_rank[0]
    gathered.pop("padding")
    assert gathered.keys() == original.keys()
    for tensor_name, copies in gathered.items():
        assert all(torch.equal(copy, original[tensor_name]) for copy in copies)
