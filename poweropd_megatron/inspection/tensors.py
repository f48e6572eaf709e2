"""The tensors of a folder under their Hugging Face names, in either format, a piece at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from poweropd_megatron.conversion.arrays import (
    PIECE_BYTES,
    Array,
    Buffer,
    Rearranged,
    merged_runs,
    read_pieces,
    split_runs,
)
from poweropd_megatron.conversion.dist_source import DistSource, parts_in_order
from poweropd_megatron.conversion.hf_tensors import read_tensors
from poweropd_megatron.inspection.findings import SETTING, Findings
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.torch_dist_folder import TorchDistFolder


@dataclass(frozen=True)
class NamedTensor:
    """A tensor, and where its rows are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    array: Array

    def pieces(self) -> Iterator[Buffer]:
        """Yield its bytes in order, in pieces of a few MB, each of which the next overwrites.

        Raises: InputError if they can't be read.
        """
        yield from read_pieces(
            self.array, np.empty(PIECE_BYTES, np.uint8), range(self.array.num_rows)
        )

    def read(self) -> Tensor:
        """Return all of it. Raises: InputError if it can't be read."""
        content = np.empty((self.array.num_rows, self.array.row_bytes), np.uint8)
        self.array.read(0, content)
        return torch.from_numpy(content).view(-1).view(self.dtype).view(self.shape)


def tensors_of(findings: Findings) -> dict[str, NamedTensor]:
    """Return the tensors of a folder that examine() has found without problems, by name.

    Raises: InputError if some are of another type than bf16, fp16 or fp32.
    """
    if findings.kind == "hugging-face":
        return {
            name: NamedTensor(tensor.dtype, tensor.shape, tensor.array)
            for name, tensor in read_tensors(findings.path, setting=SETTING).items()
        }
    assert findings.model is not None
    folder = TorchDistFolder(findings.weights_path, setting=SETTING)
    return dict(_taken_apart(folder, findings.model))


def _taken_apart(folder: TorchDistFolder, model: ModelConfig) -> Iterator[tuple[str, NamedTensor]]:
    """Yield the tensors that each stored parameter was merged from."""
    source = DistSource(folder, model, prefers_masters=False)
    runs_of = {}
    for stored, index in parts_in_order(model):
        if stored.key not in runs_of:
            runs_of[stored.key] = merged_runs(stored.weight)
        merged, dtype = source.array(stored, index), source.dtype(stored, index)
        weight = stored.weight.at(**dict(zip(stored.weight.stacked, index, strict=True)))
        for number, shape in enumerate(weight.shapes):
            runs = split_runs(runs_of[stored.key], number)
            rows = Rearranged([merged], runs, shape[0], merged.row_bytes)
            yield weight.hugging_face[number], NamedTensor(dtype, shape, rows)
