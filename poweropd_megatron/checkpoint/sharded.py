"""Megatron's sharded state in and out of a folder: global tensors for any layout."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StoragePrefix,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from poweropd_megatron.checkpoint.store import CheckpointStore, digest, read_manifest, verify
from poweropd_megatron.errors import CheckpointError
from poweropd_megatron.models.torch_dist_folder import incompleteness
from poweropd_megatron.parallel.world import agreed

FILE_BYTES = 10**9
MAX_FILES = 8
"""Of a rank: torch.save and SHA-256 keep one core busy at about 0.5 GB/s each."""


class _PlainSave(megatron_torch.TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's planner with torch's own file writer.

    Megatron's writer needs CUDA and spawns a process that imports __main__ again; torch's does
    neither.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        """Write this rank's shards. Source: TorchDistSaveShardedStrategy.async_save."""
        state_dict, _, _ = megatron_torch._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        state_dict_saver.save(
            megatron_torch.mcore_to_pyt_state_dict(state_dict, False),
            storage_writer=_Writer(checkpoint_dir),
            planner=megatron_torch.MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )


class _Writer(FileSystemWriter):
    """torch's file writer, over as many threads and files as there is to write.

    A refused write is the operating system's error: torch.save ends with one about its own file
    positions instead, whatever the cause. torch's own threads would lose it.
    """

    def __init__(self, path: Path) -> None:
        # Copying ahead is done on streams, and a thread's are those of the first GPU.
        super().__init__(path, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shards. Raises: OSError."""
        prefix, (first, *others) = plan.storage_data.prefix, _dealt_out(plan.items)
        parts = [
            replace(plan, items=first),
            *(
                replace(plan, items=items, storage_data=_StoragePrefix(f"{prefix}{number}_"))
                for number, items in enumerate(others, start=1)
            ),
        ]
        with ThreadPoolExecutor(len(parts)) as threads:
            written = list(threads.map(lambda part: self._write_part(part, planner), parts))
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for results in written for result in results])
        return future

    def _write_part(self, part: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        try:
            results: list[WriteResult] = super().write_data(part, planner).wait()
            return results
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def _dealt_out(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Return what goes into each file, about as much into each."""
    sizes = [0 if item.tensor_data is None else _num_bytes(item.tensor_data) for item in items]
    files: list[list[WriteItem]] = [[] for _ in range(min(1 + sum(sizes) // FILE_BYTES, MAX_FILES))]
    filled = [0] * len(files)
    for number in sorted(range(len(items)), key=lambda number: -sizes[number]):
        emptiest = filled.index(min(filled))
        files[emptiest].append(items[number])
        filled[emptiest] += sizes[number]
    return files


def _num_bytes(data: TensorWriteData) -> int:
    return prod(data.chunk.sizes) * data.properties.dtype.itemsize


def save(state: dict[str, Any], store: CheckpointStore, step: int) -> Path:
    """Return the published checkpoint of `state`. Called by all ranks.

    Each rank writes its shards; then the files are read back and hashed, the metadata is checked
    against them, and rank 0 publishes. Raises: CheckpointError on all ranks if any of it fails;
    nothing becomes visible then.
    """
    is_first = dist.get_rank() == 0
    partial = agreed(lambda: store.begin(step) if is_first else store.partial(step))
    try:
        try:
            dist_checkpointing.save(state, str(partial), sharded_strategy=_PlainSave())
        except (CheckpointException, OSError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} can't be written: {_reason(error)}"
            ) from error
        digests = _digests(partial)
        return agreed(lambda: _publish(store, partial, step, digests))
    except CheckpointError:
        if is_first:
            store.discard(partial)
        raise


def load(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Return `state` with the values of a verified checkpoint. Called by all ranks.

    Raises: CheckpointError if a tensor is missing or has another shape.
    """
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint))
    except (CheckpointException, CheckpointingException) as error:
        raise CheckpointError(f"{checkpoint} doesn't fit this run: {_reason(error)}") from error
    return loaded


def load_common(checkpoint: Path) -> dict[str, Any]:
    """Return what a verified checkpoint holds beside sharded tensors."""
    common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(checkpoint))
    return common


def verify_together(checkpoint: Path) -> None:
    """Return if the checkpoint's files are intact; the ranks share the reading.

    Raises: CheckpointError on all ranks, naming the file.
    """
    agreed(lambda: verify(checkpoint, _own(sorted(read_manifest(checkpoint)))))


def _reason(error: BaseException) -> str:
    """Return the message of an error without the traces that torch adds to those of the ranks."""
    if isinstance(error, CheckpointException):
        failures = sorted(error.failures.items())
        return "; ".join(f"{failure} (on rank {rank})" for rank, (failure, _) in failures)
    return str(error)


def _own(names: list[str]) -> list[str]:
    return names[dist.get_rank() :: dist.get_world_size()]


def _digests(partial: Path) -> dict[str, str]:
    """Return the SHA-256 of each file, each read back by one thread of one rank."""
    dist.barrier()
    own = _own(sorted(file.name for file in partial.iterdir()))
    with ThreadPoolExecutor(MAX_FILES) as threads:
        hashed = dict(zip(own, threads.map(lambda name: digest(partial / name), own), strict=True))
    parts: list[dict[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, hashed)
    return {name: value for part in parts if part for name, value in part.items()}


def _publish(store: CheckpointStore, partial: Path, step: int, digests: dict[str, str]) -> Path:
    if dist.get_rank() == 0:
        _check_metadata(partial)
        store.publish(partial, step, digests)
    return store.path(step)


def _check_metadata(partial: Path) -> None:
    """Raise CheckpointError unless every stored item lies inside its file."""
    problem = incompleteness(partial, FileSystemReader(partial).read_metadata())
    if problem is not None:
        raise CheckpointError(problem)
