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
    read_pieces,
)
from poweropd_megatron.conversion.dist_source import DistSource, hugging_face_tensors
from poweropd_megatron.conversion.hf_tensors import read_tensors
from poweropd_megatron.inspection.findings import SETTING, Findings
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
    source = DistSource(folder, findings.model, prefers_masters=False)
    return {
        part.name: NamedTensor(part.dtype, part.shape, part.rows)
        for part in hugging_face_tensors(source, findings.model)
    }
