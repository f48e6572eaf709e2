"""A torch_dist folder read tensor by tensor: no process group, no model, any writer's layout."""

import io
import pickle
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from poweropd_megatron.errors import InputError

METADATA_NAME = ".metadata"


@dataclass(frozen=True)
class StoredPiece:
    """A part of a global tensor, which torch.save wrote into a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    position: int
    length: int
    """Where in the file, and how many bytes there."""


class TorchDistFolder:
    """The global tensors that torch.distributed.checkpoint stored in a folder, in whatever pieces.

    Its .metadata is a pickle: open folders from trusted places only.
    """

    def __init__(self, path: str | Path, *, setting: str) -> None:
        """Read what is stored where.

        Raises: InputError if the folder is incomplete: no .metadata, or a file missing or cut off.
        """
        self.path = Path(path)
        self.setting = setting
        self._reader = FileSystemReader(self.path)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            problem = incompleteness(self.path, self._metadata)
        except FileNotFoundError:
            raise InputError(
                f"{setting}: {self.path / METADATA_NAME} is missing; expected a torch_dist folder"
            ) from None
        except Exception as error:  # a damaged pickle raises whatever its bytes happen to call
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{setting}: {self.path / METADATA_NAME} can't be read: {reason}"
            ) from None
        if problem is not None:
            raise InputError(f"{setting}: {problem}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the global shape of each tensor by its key."""
        return {
            key: tuple(stored.size)
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def objects(self) -> frozenset[str]:
        """Return the keys of what is stored beside tensors."""
        return frozenset(self._metadata.state_dict_metadata) - self.shapes().keys()

    def files(self) -> dict[str, int]:
        """Return the bytes of each file that holds tensors or objects, by name."""
        names = {stored.relative_path for stored in self._metadata.storage_data.values()}
        return {name: (self.path / name).stat().st_size for name in sorted(names)}

    def cuts(self, key: str, dim: int) -> int:
        """Return into how many pieces the writer had cut a tensor along a dimension."""
        return len({chunk.offsets[dim] for chunk in self._tensor(key).chunks})

    def common_state(self) -> dict[str, Any]:
        """Return what Megatron stored once beside sharded tensors: plain values only.

        It is empty where there is none. Raises: InputError if it can't be read, or holds more.
        """
        try:
            if (self.path / "common.pt").is_file():  # as Megatron wrote it before 0.19
                return dict(torch.load(self.path / "common.pt", weights_only=True))
            stored = self._metadata.storage_data.get(MetadataIndex("common_state/shard_0_1"))
            if stored is None:
                return {}
            with (self.path / stored.relative_path).open("rb") as file:
                file.seek(stored.offset)
                content = io.BytesIO(file.read(stored.length))
            [state] = torch.load(content, weights_only=True)
            return dict(state)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.setting}: {self.path}: the common state can't be read: {reason}"
            ) from None

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self._tensor(key).properties.dtype

    def pieces(self, key: str) -> list[StoredPiece]:
        """Return the parts that a tensor is stored in.

        Raises: InputError if there is no such tensor, or it is stored compressed.
        """
        found = []
        for number, chunk in enumerate(self._tensor(key).chunks):
            place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets, number)]
            if place.transform_descriptors:
                raise InputError(
                    f"{self.setting}: {self.path} stores {key} as {place.transform_descriptors}, "
                    "expected plain tensors"
                )
            path = self.path / place.relative_path
            found.append(
                StoredPiece(
                    tuple(chunk.offsets), tuple(chunk.sizes), path, place.offset, place.length
                )
            )
        return found

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Return stored[index]: a layer's or an expert's part of a tensor, or all of it.

        Raises: InputError if there is no such tensor, its pieces leave gaps, or can't be read.
        Cost: reads each stored piece that overlaps, whole.
        """
        stored = self._tensor(key)
        start = torch.Size((*index, *[0] * (len(stored.size) - len(index))))
        size = torch.Size((*[1] * len(index), *stored.size[len(index) :]))
        target = torch.empty(size, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(key, stored, [ChunkStorageMetadata(start, size)])
        if sum(prod(item.lengths) for item in items) != target.numel():
            raise InputError(f"{self.setting}: {self.path} holds only parts of {key}{list(index)}")
        try:
            self._reader.read_data(LoadPlan(items), _IntoOne(target)).wait()
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            files = {self._file_of(item) for item in items}
            raise InputError(
                f"{self.setting}: {key} can't be read from {', '.join(sorted(files))}: {error}"
            ) from None
        return target.view(stored.size[len(index) :])

    def _tensor(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise InputError(f"{self.setting}: {self.path} has no tensor {key}")
        return stored

    def _file_of(self, item: ReadItem) -> str:
        return str(self.path / self._metadata.storage_data[item.storage_index].relative_path)


def incompleteness(folder: Path, metadata: Metadata) -> str | None:
    """Return which file of a torch_dist folder is missing or cut off; None if none is.

    Nor may a piece of a tensor be somewhere that the metadata doesn't say.
    """
    for key, stored in metadata.state_dict_metadata.items():
        for chunk in getattr(stored, "chunks", ()):
            if MetadataIndex(key, chunk.offsets) not in metadata.storage_data:
                return f"{folder / METADATA_NAME} doesn't say where {key}{list(chunk.offsets)} is"
    sizes: dict[str, int] = {}
    for index, stored in (metadata.storage_data or {}).items():
        file = folder / stored.relative_path
        if stored.relative_path not in sizes:
            if not file.is_file():
                return f"{file} is missing, where {index.fqn} is"
            sizes[stored.relative_path] = file.stat().st_size
        if sizes[stored.relative_path] < stored.offset + stored.length:
            return f"{file} was not written completely: {index.fqn} is cut off"
    return None


class _IntoOne(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the plan is made by hand."""

    def create_local_plan(self) -> LoadPlan:
        """Refuse: the plan is made by hand."""
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse: the plan is made by hand."""
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Refuse: the plan is made by hand."""
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Refuse: only tensors are read."""
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return where a piece goes."""
        place = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(dim, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the piece is in its place."""
