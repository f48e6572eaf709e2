"""Hugging Face weights into shards and back: bitwise, in every layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.rank_pool import RankPool
from torch import Tensor
from training import whole_tensors

from poweropd_megatron.config.schema import DType, ParallelConfig
from poweropd_megatron.models.build import build_model
from poweropd_megatron.models.qwen3 import Qwen3Config
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import student_layout

LAYOUTS = {
    "one-process": (1, 1, 1),
    "TP2": (2, 2, 1),
    "PP2": (2, 1, 2),
    "TP2xPP2": (4, 2, 2),
    "PP4": (4, 1, 4),
}


def load_and_gather(parallel: ParallelConfig, folder: str, dtype: DType) -> dict[str, list[Tensor]]:
    cpu_device.install()
    layout = student_layout(parallel, torch.device("cpu"), seed=1)
    model = Qwen3Config.from_folder(folder, setting="student.path")
    [chunk] = build_model(model, layout, folder=folder, dtype=dtype, setting="student.path")
    return whole_tensors(chunk, layout, model, lambda weight: weight)


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_put_together_are_the_folders_tensors_bitwise(
    name: str, embeddings: str, folders: dict[str, str], ranks: RankPool
) -> None:
    world_size, tensor, pipeline = LAYOUTS[name]
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    folder = folders[f"student-{embeddings}"]
    original = load_file(Path(folder, "model.safetensors"))
    gathered = ranks.run(load_and_gather, parallel, folder, "fp32", world_size=world_size)[0]
    padding = gathered.pop("padding")
    assert gathered.keys() == original.keys()
    for tensor_name, copies in gathered.items():
        assert all(torch.equal(copy, original[tensor_name]) for copy in copies)
    assert sum(map(len, padding)) == (0 if tensor == 1 else len(padding))
    assert all((rows == 0).all() for rows in padding)


def test_shards_in_bf16_are_the_rounded_tensors(folders: dict[str, str], ranks: RankPool) -> None:
    folder = folders["student-untied"]
    original = load_file(Path(folder, "model.safetensors"))
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    gathered = ranks.run(load_and_gather, parallel, folder, "bf16", world_size=2)[0]
    for name, tensor in original.items():
        assert torch.equal(gathered[name][0], tensor.to(torch.bfloat16))
