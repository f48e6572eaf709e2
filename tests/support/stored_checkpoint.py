"""Writes torch_dist folders in pieces of any size, as ranks of a layout do, with torch's writer."""

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)


def write_in_pieces(
    folder: Path,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, Sequence[int]],
    objects: Mapping[str, object] | None = None,
) -> None:
    """Write global tensors, each in pieces of at most the size that `sizes` has for it, and what
    is stored as an object."""
    dcp.save(
        {},
        storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=3),
        planner=_PieceByPiece(tensors, sizes, objects or {}),
        no_dist=True,
    )


class _PieceByPiece(DefaultSavePlanner):
    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        sizes: Mapping[str, Sequence[int]],
        objects: Mapping[str, object],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._sizes, self._objects = tensors, sizes, objects

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        self.state_dict, self.is_coordinator = {}, True

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(key, chunk.offsets, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk, TensorProperties(dtype=tensor.dtype), tensor.shape
                ),
            )
            for key, tensor in self._tensors.items()
            for number, chunk in enumerate(_chunks(tensor, self._sizes.get(key, tensor.shape)))
        ]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        if item.tensor_data is None:
            content = io.BytesIO()
            torch.save(self._objects[item.index.fqn], content)
            return content
        chunk = item.tensor_data.chunk
        place = tuple(
            slice(start, start + size)
            for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
        )
        return self._tensors[item.index.fqn][place].contiguous()


def _chunks(tensor: Tensor, size: Sequence[int]) -> Iterator[ChunkStorageMetadata]:
    starts = [range(0, whole, step) for whole, step in zip(tensor.shape, size, strict=True)]
    for offsets in product(*starts):
        sizes = [
            min(step, whole - start)
            for step, whole, start in zip(size, tensor.shape, offsets, strict=True)
        ]
        yield ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
