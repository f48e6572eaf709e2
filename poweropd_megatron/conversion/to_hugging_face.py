"""A Megatron-Core checkpoint (torch_dist) as a Hugging Face folder, without a model.

Tensors go from file to file in pieces, so memory does not grow with the model, nor with the files.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poweropd_megatron.conversion import partial, shards, workers
from poweropd_megatron.conversion.arrays import (
    PIECE_BYTES,
    Array,
    cast_bytes,
    read_pieces,
)
from poweropd_megatron.conversion.dist_items import cut_rows
from poweropd_megatron.conversion.dist_source import (
    DistSource,
    hugging_face_tensors,
    weights_folder,
)
from poweropd_megatron.conversion.hf_tensors import EMBEDDING, HEAD, make_header, read_tensors
from poweropd_megatron.conversion.stated_model import check_reference
from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.hf_folder import INDEX_NAME
from poweropd_megatron.models.other_files import check_other_files, copy_other_files
from poweropd_megatron.models.torch_dist_folder import TorchDistFolder

_INPUT, _OUTPUT, _REFERENCE = "--input", "--output", "--reference"


def to_hugging_face(
    source: Path,
    output: Path,
    *,
    reference: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    num_workers: int = 1,
) -> None:
    """Write the folder: weights, index, and all other files of the reference.

    reference: a Hugging Face folder, whose weights may be missing, or a converted one; by default
    the source, which then holds config.json. Tensors go into the files that its index names, and
    lm_head.weight of tied embeddings is written if it is there; with max_shard_bytes, or without
    an index or weights, files are filled up to that size (5 GB).
    dtype: None keeps each tensor's own; fp32 takes the optimizer's copies where there are any.
    Cost: reads and writes every byte once; a few MB of memory for each worker.
    Raises: InputError naming file and tensor before anything is written, if the checkpoint isn't
    of the model that the reference's config.json describes, by its tensors or by what it says of
    itself; or if the output can't be written.
    """
    partial.check_places(output, _OUTPUT, input=source, reference=reference)
    weights = weights_folder(source, setting=_INPUT)
    partial.check_places(output, _OUTPUT, input=weights.resolve())
    tensors, others = _plan_tensors(source, weights, reference, dtype)
    other_bytes = check_other_files(others, setting=_REFERENCE)
    files = _files(tensors, others, max_shard_bytes)
    jobs = list(_jobs(files, max_bytes=_job_bytes(tensors)))
    with partial.claimed(output, _OUTPUT) as folder:
        conversion = _Conversion(folder.path, files, jobs, os.getpid())
        plan = {
            "to": "hugging_face",
            "input": [str(weights.resolve()), partial.fingerprint(weights)],
            "reference": partial.fingerprint(others),
            "dtype": str(dtype),
            "files": [[file.name, file.num_bytes, list(file.offsets)] for file in files],
            "jobs": len(jobs),
        }

        def keep(part: int, facts: dict[str, Any]) -> None:
            folder.record(part, folder.path / jobs[part].file.name, facts)

        try:
            done = folder.begin(plan)
            missing = {part: job.num_bytes for part, job in enumerate(jobs) if part not in done}
            partial.check_space(folder.path, sum(missing.values()) + other_bytes, _OUTPUT)
            for file in files:
                file.create(folder.path)
            workers.run_parts(
                missing, conversion.write, keep, num_workers=num_workers, verb="export"
            )
            kinds = {tensor.dtype for tensor in tensors}
            copy_other_files(
                others,
                folder.path,
                dtype=kinds.pop() if len(kinds) == 1 else None,
                setting=_REFERENCE,
            )
            _write_index(folder.path, files)
            _check_written(folder.path, tensors)
            folder.publish()
        except OSError as error:
            raise InputError(f"{_OUTPUT}: {output} can't be written: {error}") from None


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written, and where its rows are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: Array
    source_dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes


def _plan_tensors(
    source: Path, weights: Path, reference: Path | None, dtype: torch.dtype | None
) -> tuple[list[_Tensor], Path]:
    """Return the tensors in order, and the folder with the other files."""
    folder = TorchDistFolder(weights, setting=_INPUT)
    if reference is None and not (source / "config.json").is_file():
        raise InputError(
            f"{_REFERENCE}: {source} has no config.json; name the Hugging Face folder that the "
            "model came from"
        )
    others = reference or source
    config = read_model_config(others, setting=_REFERENCE)
    check_reference(config, others, source, folder, setting=_REFERENCE)
    found = DistSource(folder, config, prefers_masters=dtype == torch.float32)
    tensors = [
        _Tensor(part.name, dtype or part.dtype, part.shape, part.rows, part.dtype)
        for part in hugging_face_tensors(found, config)
    ]
    if config.tie_word_embeddings and HEAD in shards.reference_files(others, setting=_REFERENCE):
        (embedding,) = [tensor for tensor in tensors if tensor.name == EMBEDDING]
        tensors.append(_replace_name(embedding, HEAD))
    return tensors, others


def _replace_name(tensor: _Tensor, name: str) -> _Tensor:
    return _Tensor(name, tensor.dtype, tensor.shape, tensor.source, tensor.source_dtype)


class _File:
    """A safetensors file to be written."""

    def __init__(self, name: str, tensors: Sequence[_Tensor]) -> None:
        self.name = name
        self.tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
        kinds = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors}
        self._header, self.offsets = make_header(kinds)
        self.num_bytes = len(self._header) + sum(tensor.num_bytes for tensor in tensors)

    def create(self, folder: Path) -> None:
        """Write the header, and give the file its size. Raises: OSError."""
        descriptor = os.open(folder / self.name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, self._header, 0)
            os.truncate(descriptor, self.num_bytes)
        finally:
            os.close(descriptor)


def _files(tensors: Sequence[_Tensor], others: Path, max_shard_bytes: int | None) -> list[_File]:
    weight_map = shards.reference_files(others, setting=_REFERENCE)
    if weight_map:
        names = [tensor.name for tensor in tensors]
        shards.check_same_tensors(weight_map, names, setting=_REFERENCE, reference=others)
    if not weight_map or max_shard_bytes is not None:
        weight_map = shards.by_size(
            [shards.Tensor(tensor.name, tensor.num_bytes) for tensor in tensors],
            max_shard_bytes or shards.DEFAULT_MAX_SHARD_BYTES,
        )
    inside: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        inside.setdefault(weight_map[tensor.name], []).append(tensor)
    return [_File(name, inside[name]) for name in sorted(inside)]


@dataclass(frozen=True)
class _Rows:
    """Rows of a tensor, and where they begin in the file."""

    tensor: _Tensor
    rows: range
    offset: int


@dataclass(frozen=True)
class _Job:
    """Rows that one worker writes into one file."""

    file: _File
    rows: Sequence[_Rows]

    @property
    def num_bytes(self) -> int:
        return sum(len(part.rows) * part.tensor.row_bytes for part in self.rows)


def _job_bytes(tensors: Sequence[_Tensor]) -> int:
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    return min(max(total_bytes // 16, 2**20), 2**30)


def _jobs(files: Sequence[_File], max_bytes: int) -> Iterator[_Job]:
    """Yield the work, in parts that don't depend on the number of workers."""
    for file in files:
        group: list[_Rows] = []
        group_bytes = 0
        for tensor in file.tensors:
            for first_row, num_rows in cut_rows(tensor.shape[0], tensor.row_bytes):
                offset = file.offsets[tensor.name] + first_row * tensor.row_bytes
                group.append(_Rows(tensor, range(first_row, first_row + num_rows), offset))
                group_bytes += num_rows * tensor.row_bytes
                if group_bytes >= max_bytes:
                    yield _Job(file, group)
                    group, group_bytes = [], 0
        if group:
            yield _Job(file, group)


@dataclass(frozen=True)
class _Conversion:
    """What the workers share."""

    folder: Path
    files: Sequence[_File]
    jobs: Sequence[_Job]
    process: int

    def write(self, part: int) -> dict[str, Any]:
        """Write a job's rows. Raises: OSError, InputError."""
        job = self.jobs[part]
        buffer = np.empty(PIECE_BYTES, np.uint8)
        descriptor = os.open(self.folder / job.file.name, os.O_WRONLY)
        try:
            for part_rows in job.rows:
                tensor, offset = part_rows.tensor, part_rows.offset
                for piece in read_pieces(tensor.source, buffer, part_rows.rows):
                    workers.exit_if_abandoned(self.process)
                    view = memoryview(cast_bytes(piece, tensor.source_dtype, tensor.dtype))
                    view = view.cast("B")
                    while view:
                        count = os.pwrite(descriptor, view, offset)
                        view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)
        return {}


def _write_index(folder: Path, files: Sequence[_File]) -> None:
    if [file.name for file in files] != ["model.safetensors"]:
        tensors = [(tensor, file.name) for file in files for tensor in file.tensors]
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor, _ in tensors)},
            "weight_map": {tensor.name: name for tensor, name in tensors},
        }
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / INDEX_NAME).write_text(text + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if path.is_file():
            partial.fsync(path)


def _check_written(folder: Path, tensors: Sequence[_Tensor]) -> None:
    """Open what was written anew, and compare names, types and shapes. Raises: InputError."""
    expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    written = read_tensors(folder, setting=_OUTPUT)
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()}
    differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if differing:
        raise InputError(f"{_OUTPUT}: {folder} differs from what was to be written: {differing[0]}")
