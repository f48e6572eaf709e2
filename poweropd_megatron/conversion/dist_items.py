"""What a torch_dist checkpoint of a model consists of: items, the files they lie in, the metadata.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py (what the metadata holds),
megatron/core/dist_checkpointing/serialization.py (the common state beside the tensors).
"""

import io
import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from poweropd_megatron.conversion.arrays import Run
from poweropd_megatron.models.families.weight import StoredTensor

MAX_ITEM_BYTES = 64 * 2**20
"""A rank that loads a slice reads the whole items that it lies in, so they are small."""
COMMON_FILE = "__0_0.distcp"
_COMMON_KEY = "common_state/shard_0_1"


@dataclass(frozen=True)
class Item:
    """Rows of one parameter of one layer and expert, which are stored together."""

    key: str
    dtype: torch.dtype
    index: tuple[int, ...]
    """Of the layer, and of the expert, where there are such dimensions."""
    hugging_face: tuple[str, ...]
    runs: Sequence[Run]
    """Where the parameter's rows come from."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    first_row: int
    num_rows: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """Return the item's place in the stored tensor."""
        return (*self.index, self.first_row, *[0] * (len(self.shape) - 1))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the item's shape as it is stored."""
        return (*[1] * len(self.index), self.num_rows, *self.shape[1:])

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its elements."""
        return prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class ItemFile:
    """A file of items, one after another."""

    name: str
    items: Sequence[Item]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the elements in it."""
        return sum(item.num_bytes for item in self.items)


def cut_rows(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield first row and number of rows of items that are no larger than MAX_ITEM_BYTES."""
    rows_at_once = max(1, MAX_ITEM_BYTES // row_bytes)
    for first_row in range(0, num_rows, rows_at_once):
        yield first_row, min(rows_at_once, num_rows - first_row)


def deal(items: Iterable[Item], max_bytes: int) -> list[ItemFile]:
    """Return the items in files, each closed by the item that takes it beyond max_bytes."""
    groups: list[list[Item]] = [[]]
    group_bytes = 0
    for item in items:
        if group_bytes >= max_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(item)
        group_bytes += item.num_bytes
    return [ItemFile(f"__0_{number}.distcp", group) for number, group in enumerate(groups, 1)]


def write_metadata(
    folder: Path,
    stored: Iterable[StoredTensor],
    places: Iterable[tuple[Item, str, int, int]],
) -> None:
    """Write what makes a folder of item files a torch_dist checkpoint.

    places: each item with its file's name, and where and how long it is there.
    Raises: OSError.
    """
    shapes = {tensor.key: tensor.shape for tensor in stored}
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for item, name, offset, length in places:
        if item.key not in tensors:
            tensors[item.key] = TensorStorageMetadata(
                TensorProperties(dtype=item.dtype), torch.Size(shapes[item.key]), []
            )
        chunks = tensors[item.key].chunks
        index = MetadataIndex(item.key, item.offsets, len(chunks))
        storage[index] = _StorageInfo(name, offset, length)
        chunks.append(ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes)))
    common = io.BytesIO()
    torch.save([{"checkpoint_version": 3.0, "iteration": 0}], common)
    (folder / COMMON_FILE).write_bytes(common.getvalue())
    tensors[_COMMON_KEY] = BytesStorageMetadata()
    storage[MetadataIndex(_COMMON_KEY)] = _StorageInfo(COMMON_FILE, 0, len(common.getvalue()))
    metadata = Metadata(
        tensors, planner_data={}, storage_data=storage, storage_meta=StorageMeta(), version="1.0.0"
    )
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend), encoding="utf-8")
