"""A Hugging Face folder as a Megatron-Core checkpoint (torch_dist), without a model.

Tensors go from file to file in pieces, so memory does not grow with the model. The checkpoint holds
global tensors: any parallel layout loads it.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poweropd_megatron.checkpoint.store import MANIFEST_NAME, digest, write_manifest
from poweropd_megatron.conversion import dist_items, partial, workers
from poweropd_megatron.conversion.arrays import (
    PIECE_BYTES,
    Buffer,
    Rearranged,
    cast_bytes,
    merged_runs,
    read_pieces,
)
from poweropd_megatron.conversion.dist_items import Item, ItemFile
from poweropd_megatron.conversion.hf_tensors import HFTensor, check_tensors, read_tensors
from poweropd_megatron.conversion.torch_items import Containers
from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families import read_model_config, stored_tensors
from poweropd_megatron.models.families.weight import StoredTensor
from poweropd_megatron.models.other_files import check_other_files, copy_other_files
from poweropd_megatron.models.weight_source import WEIGHTS_NAME

_TRACKER = "latest_checkpointed_iteration.txt"
_INPUT, _OUTPUT = "--input", "--output"


def to_megatron(
    source: Path, output: Path, *, dtype: torch.dtype | None = None, num_workers: int = 1
) -> None:
    """Write the checkpoint: config.json and all files but weights, and the weights in a folder.

    dtype: None keeps each tensor's own.
    Cost: reads and writes every byte once; a few MB of memory for each worker.
    Raises: InputError naming file and tensor before anything is written, if the folder isn't a
    whole model of a known family; or if the output can't be written.
    """
    partial.check_places(output, _OUTPUT, input=source)
    config = read_model_config(source, setting=_INPUT)
    tensors = read_tensors(source, setting=_INPUT)
    check_tensors(config, tensors, setting=_INPUT)
    other_bytes = check_other_files(source, setting=_INPUT)
    stored = list(stored_tensors(config))
    items = list(_items(stored, tensors, dtype))
    total_bytes = sum(item.num_bytes for item in items)
    files = dist_items.deal(items, max_bytes=min(max(total_bytes // 16, 2**20), 4 * 2**30))
    with partial.claimed(output, _OUTPUT) as folder:
        conversion = _Conversion(folder.path / WEIGHTS_NAME, tensors, files, os.getpid())
        plan = {
            "to": "megatron",
            "input": [str(source.resolve()), partial.fingerprint(source)],
            "dtype": str(dtype),
            "files": [[file.name, len(file.items), file.num_bytes] for file in files],
        }

        def keep(part: int, facts: dict[str, Any]) -> None:
            folder.record(part, conversion.folder / files[part].name, facts)

        try:
            done = folder.begin(plan)
            missing = {part: file.num_bytes for part, file in enumerate(files) if part not in done}
            partial.check_space(folder.path, sum(missing.values()) + other_bytes, _OUTPUT)
            conversion.folder.mkdir(exist_ok=True)
            workers.run_parts(
                missing, conversion.write, keep, num_workers=num_workers, verb="import"
            )
            digests = {file.name: folder.facts(part)["sha256"] for part, file in enumerate(files)}
            dist_items.write_metadata(conversion.folder, stored, conversion.places())
            kinds = {item.dtype for item in items}
            copy_other_files(
                source,
                folder.path,
                dtype=kinds.pop() if len(kinds) == 1 else None,
                setting=_INPUT,
            )
            _finish(folder.path, digests)
            folder.publish()
        except OSError as error:
            raise InputError(f"{_OUTPUT}: {output} can't be written: {error}") from None


def _items(
    stored: Sequence[StoredTensor], tensors: dict[str, HFTensor], dtype: torch.dtype | None
) -> Iterator[Item]:
    """Yield the items, layer by layer."""
    rows_of: list[tuple[int, Item]] = []
    for tensor in stored:
        runs, shape = merged_runs(tensor.weight), tensor.weight.shape
        first: str | None = None
        for index, weight in tensor.parts():
            for name in weight.hugging_face:
                first = first or name
                if dtype is None and tensors[name].dtype != tensors[first].dtype:
                    raise InputError(
                        f"{_INPUT}: {tensors[name].path}: {name} is {tensors[name].dtype}, but "
                        f"{first}, which {tensor.key} stores with it, is {tensors[first].dtype}: "
                        "choose one with --dtype"
                    )
            assert first is not None
            item = Item(
                tensor.key,
                dtype or tensors[first].dtype,
                index,
                weight.hugging_face,
                runs,
                shape,
                0,
                shape[0],
            )
            rows_of.append((index[0] if index else -1, item))
    for _, item in sorted(rows_of, key=lambda pair: pair[0]):
        for first_row, num_rows in dist_items.cut_rows(
            item.num_rows, item.num_bytes // item.num_rows
        ):
            yield replace(item, first_row=first_row, num_rows=num_rows)


@dataclass(frozen=True)
class _Conversion:
    """What the workers share."""

    folder: Path
    tensors: dict[str, HFTensor]
    files: Sequence[ItemFile]
    process: int

    def write(self, part: int) -> dict[str, Any]:
        """Return the SHA-256 of a file, after writing it.

        Raises: OSError, InputError.
        """
        file, sha256 = self.files[part], hashlib.sha256()
        buffer = np.empty(PIECE_BYTES, np.uint8)
        containers = Containers()
        with (self.folder / file.name).open("wb", buffering=0) as stream:

            def put(data: bytes | Buffer) -> None:
                view = memoryview(data).cast("B")
                sha256.update(view)
                while view:
                    view = view[stream.write(view) :]

            for item in file.items:
                around = containers.of(item.sizes, item.dtype)
                put(around.head)
                for piece in self._pieces(item, buffer):
                    workers.exit_if_abandoned(self.process)
                    put(piece)
                put(around.tail)
        return {"sha256": sha256.hexdigest()}

    def places(self) -> Iterator[tuple[Item, str, int, int]]:
        """Yield each item with its file, and where and how long it is there."""
        containers = Containers()
        for file in self.files:
            offset = 0
            for item in file.items:
                length = containers.of(item.sizes, item.dtype).length(item.num_bytes)
                yield item, file.name, offset, length
                offset += length

    def _pieces(self, item: Item, buffer: Buffer) -> Iterator[Buffer]:
        sources = [self.tensors[name] for name in item.hugging_face]
        array = Rearranged(
            [source.array for source in sources],
            item.runs,
            item.shape[0],
            sources[0].array.row_bytes,
        )
        rows = range(item.first_row, item.first_row + item.num_rows)
        for piece in read_pieces(array, buffer, rows):
            yield cast_bytes(piece, sources[0].dtype, item.dtype)


def _finish(folder: Path, digests: dict[str, str]) -> None:
    """Write the manifest, and what lets Megatron-LM's --load find the weights."""
    weights = folder / WEIGHTS_NAME
    for path in weights.iterdir():
        if path.name not in digests and path.name != MANIFEST_NAME:
            digests[path.name] = digest(path)
    write_manifest(weights, digests)
    (folder / _TRACKER).write_text("release", encoding="utf-8")
    (folder / "release").unlink(missing_ok=True)
    (folder / "release").symlink_to(WEIGHTS_NAME)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".distcp":
            partial.fsync(path)
