"""The parameters of a model in a torch_dist checkpoint, whoever wrote it and in whatever layout."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path

import torch

from poweropd_megatron.conversion.arrays import (
    Array,
    Buffer,
    Files,
    Rearranged,
    Run,
    Tile,
    Tiled,
    merged_runs,
    split_runs,
)
from poweropd_megatron.conversion.torch_items import tensor_offset
from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families import stored_tensors
from poweropd_megatron.models.families.weight import StoredTensor
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.torch_dist_folder import METADATA_NAME, StoredPiece, TorchDistFolder
from poweropd_megatron.models.weight_source import WEIGHTS_NAME

TRACKER_NAME = "latest_checkpointed_iteration.txt"
OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.(?:state\.(?:fp32_)?param\.(?P<of>.+))?")
"""Keys of the optimizer's state; `of`: the parameter that it is an fp32 copy of."""
_LAYERS = "decoder.layers."


def weights_folder(source: Path, *, setting: str) -> Path:
    """Return the torch_dist folder that a path names.

    It may be that folder (such as a step's of a run's checkpoints), a converted folder, or one with
    Megatron-LM's tracker file. Raises: InputError.
    """
    if (source / METADATA_NAME).is_file():
        return source
    if (source / WEIGHTS_NAME).is_dir():
        return source / WEIGHTS_NAME
    tracker = source / TRACKER_NAME
    if tracker.is_file():
        latest = _tracked(tracker, setting=setting)
        folder = source / (latest if latest == "release" else f"iter_{latest:0>7}")
        if (folder / METADATA_NAME).is_file():
            return folder
        raise InputError(
            f"{setting}: {tracker} names {latest}, but {folder} is no torch_dist checkpoint"
        )
    steps = sorted(path.parent for path in source.glob(f"**/step_*/{METADATA_NAME}"))
    hint = f"; name one of its checkpoints, such as {steps[-1]}" if steps else ""
    raise InputError(
        f"{setting}: {source} holds no torch_dist checkpoint ({METADATA_NAME} is missing){hint}"
    )


def _tracked(tracker: Path, *, setting: str) -> str:
    """Return what Megatron-LM's tracker file names. Raises: InputError."""
    try:
        latest = tracker.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{setting}: {tracker} can't be read: {error}") from None
    if not re.fullmatch(r"release|[0-9]{1,18}", latest):
        raise InputError(
            f"{setting}: {tracker} says {latest[:40]!r}; expected release, or an iteration's number"
        )
    return latest


class DistSource:
    """The parameters of a model, by their row of the family's table and their layer and expert."""

    def __init__(
        self, folder: TorchDistFolder, config: ModelConfig, *, prefers_masters: bool
    ) -> None:
        """Find each parameter.

        prefers_masters: take the optimizer's fp32 copy where the checkpoint has one.
        Raises: InputError naming the tensor that is missing, unknown, or of another shape; or whose
        copy is preferred, but not to be found in the state of an optimizer.
        """
        self.folder = folder
        self._files = Files(folder.setting)
        self._shapes = folder.shapes()
        of_optimizer = {key: OPTIMIZER.match(key) for key in self._shapes}
        has_optimizer = any(of_optimizer.values()) or any(map(OPTIMIZER.match, folder.objects()))
        self._masters = {
            match["of"]: key
            for key, match in of_optimizer.items()
            if prefers_masters and match and match["of"]
        }
        self._pieces: dict[str, dict[tuple[int, ...], list[Tile]]] = {}
        known = set(self._masters)
        for stored in stored_tensors(config):
            for key, shape in self._keys_of(stored):
                known.add(key)
                self._check_shape(stored, key, shape)
                if prefers_masters and has_optimizer:
                    self._check_master(key)
        for key in sorted(self._shapes):
            if key not in known and not of_optimizer[key]:
                raise InputError(
                    f"{folder.setting}: {folder.path} has a tensor {key}, which a "
                    f"{config.model_type} with the reference's config.json doesn't have"
                )

    def dtype(self, stored: StoredTensor, index: tuple[int, ...]) -> torch.dtype:
        """Return the type of a layer's and an expert's parameter."""
        return self.folder.dtype(self._key(stored, index)[0])

    def array(self, stored: StoredTensor, index: tuple[int, ...]) -> Tiled:
        """Return a layer's and an expert's parameter, without rows that pad the vocabulary.

        Raises: InputError if parts of it are not stored.
        """
        key, inner = self._key(stored, index)
        if key not in self._pieces:
            self._pieces[key] = self._tiles(key, len(inner))
        tiles = self._pieces[key].get(inner, [])
        num_rows = stored.weight.shape[0]
        row_bytes = prod(stored.weight.shape[1:]) * self.folder.dtype(key).itemsize
        covered_bytes = sum(
            tile.array.row_bytes * max(0, min(tile.array.num_rows, num_rows - tile.first_row))
            for tile in tiles
        )
        if covered_bytes != num_rows * row_bytes:
            raise InputError(
                f"{self.folder.setting}: {self.folder.path} holds only parts of {key}{list(inner)}"
            )
        return Tiled(tiles, num_rows, row_bytes)

    def _key(self, stored: StoredTensor, index: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Return under which key a layer's parameter is, and its index there."""
        if self._masters.get(stored.key, stored.key) in self._shapes or not index:
            return self._masters.get(stored.key, stored.key), index
        key = f"{_LAYERS}{index[0]}.{stored.key.removeprefix(_LAYERS)}"
        return self._masters.get(key, key), index[1:]

    def _keys_of(self, stored: StoredTensor) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the keys that a tensor is stored under, with the expected shapes."""
        key, inner = self._key(stored, (0,) * len(stored.stack))
        if len(inner) == len(stored.stack):
            yield key, stored.shape
            return
        for layer in range(stored.num_layers):
            yield self._key(stored, (layer, *inner))[0], stored.shape[1:]

    def _check_shape(self, stored: StoredTensor, key: str, shape: tuple[int, ...]) -> None:
        where = f"{self.folder.setting}: {self.folder.path}"
        if key not in self._shapes:
            raise InputError(f"{where} has no tensor {stored.key} (nor {key})")
        found = self._shapes[key]
        is_padded = stored.weight.is_vocabulary and found[1:] == shape[1:] and found[0] > shape[0]
        if found != shape and not is_padded:
            raise InputError(
                f"{where}: {key} has the shape {found}, but the reference's config.json implies "
                f"{shape}"
            )

    def _check_master(self, key: str) -> None:
        """Refuse a rounded weight whose exact value an optimizer may hold in another form."""
        dtype = self.folder.dtype(key)
        if dtype != torch.float32:
            raise InputError(
                f"{self.folder.setting}: {self.folder.path} has the state of an optimizer, but no "
                f"fp32 copy of {key} under optimizer.state.fp32_param: leave --dtype fp32 out to "
                f"export the weight itself, in {str(dtype).removeprefix('torch.')}"
            )

    def _tiles(self, key: str, num_leading: int) -> dict[tuple[int, ...], list[Tile]]:
        """Return the pieces of a tensor by the index of the layer and the expert."""
        dtype = self.folder.dtype(key)
        tiles: dict[tuple[int, ...], list[Tile]] = {}
        for piece in self.folder.pieces(key):
            item = _Item(self._files, piece, dtype)
            starts, sizes = piece.offsets[:num_leading], piece.sizes[:num_leading]
            first_row, *first_column = piece.offsets[num_leading:]
            num_rows, *columns = piece.sizes[num_leading:]
            row_bytes = prod(columns) * dtype.itemsize
            for number, index in enumerate(product(*map(range, sizes))):
                rows = _ItemRows(item, number * num_rows * row_bytes, num_rows, row_bytes)
                place = tuple(start + step for start, step in zip(starts, index, strict=True))
                first_byte = sum(first_column) * dtype.itemsize
                tiles.setdefault(place, []).append(Tile(first_row, first_byte, rows))
        return tiles


@dataclass(frozen=True)
class _Item:
    """A stored piece, whose bytes are found when they are first asked for."""

    files: Files
    piece: StoredPiece
    dtype: torch.dtype

    @cached_property
    def start(self) -> int:
        """Return where in the file the bytes begin."""
        piece = self.piece
        return tensor_offset(
            self.files,
            piece.path,
            piece.position,
            piece.length,
            shape=piece.sizes,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class _ItemRows:
    """Rows inside of a stored piece."""

    item: _Item
    skipped_bytes: int
    num_rows: int
    row_bytes: int

    def read(self, first_row: int, out_RB: Buffer) -> None:
        """Fill the buffer with rows from first_row. Raises: InputError."""
        offset = self.item.start + self.skipped_bytes + first_row * self.row_bytes
        self.item.files.read(self.item.piece.path, offset, out_RB)


@dataclass(frozen=True)
class TakenApart:
    """A Hugging Face tensor, whose rows lie in a parameter that is stored merged."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Array


def hugging_face_tensors(source: DistSource, config: ModelConfig) -> Iterator[TakenApart]:
    """Yield the Hugging Face tensors of a model: embedding, layers, head.

    Raises: InputError if parts of one are not stored.
    """
    runs_of: dict[str, list[Run]] = {}
    for stored, index in _parts_in_order(config):
        if stored.key not in runs_of:
            runs_of[stored.key] = merged_runs(stored.weight)
        merged, dtype = source.array(stored, index), source.dtype(stored, index)
        weight = stored.weight.at(**dict(zip(stored.weight.stacked, index, strict=True)))
        for number, shape in enumerate(weight.shapes):
            runs = split_runs(runs_of[stored.key], number)
            rows = Rearranged([merged], runs, shape[0], merged.row_bytes)
            yield TakenApart(weight.hugging_face[number], dtype, shape, rows)


def _parts_in_order(config: ModelConfig) -> Sequence[tuple[StoredTensor, tuple[int, ...]]]:
    """Return the parameters of a model as they follow one another: embedding, layers, head."""
    parts = [(stored, index) for stored in stored_tensors(config) for index, _ in stored.parts()]
    return sorted(parts, key=lambda part: part[1][0] if part[1] else _place(part[0], config))


def _place(stored: StoredTensor, config: ModelConfig) -> int:
    return -1 if stored.key.startswith("embedding.") else config.num_layers
