"""A disk that takes no more: a clear error, no half checkpoint, the one before as it was."""

import resource
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from small_run import build, train_and_save

from poweropd_megatron.checkpoint.export import export
from poweropd_megatron.checkpoint.store import CheckpointStore, verify
from poweropd_megatron.errors import CheckpointError, InputError
from poweropd_megatron.models.families import read_model_config

MAX_FILE_BYTES = 100_000
"""Less than a rank's shards, more than anything else that is written."""


def limit_files(num_bytes: int) -> None:
    """Let the kernel refuse what lies beyond num_bytes of a file, as a full disk refuses it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def save_on_a_full_disk(folder: str, tp: int) -> None:
    run = build(Path(folder), steps=1, tp=tp)
    train_and_save(run, first_step=1)
    if dist.get_rank() == dist.get_world_size() - 1:
        limit_files(MAX_FILE_BYTES)
    with pytest.raises(CheckpointError) as caught:
        run.state.save(2)
    message = str(caught.value)
    print(message)
    assert message.startswith("the checkpoint of step 2 can't be written: ")
    assert message.endswith(f"File too large (on rank {dist.get_world_size() - 1})")
    dist.barrier()
    assert [entry.name for entry in run.checkpoints.root.iterdir()] == ["step_000001"]
    limit_files(resource.RLIM_INFINITY)
    run.state.save(2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_that_does_not_fit_leaves_nothing_and_can_be_saved_later(
    world_size, tmp_path, call_on_ranks
):
    codes = call_on_ranks(save_on_a_full_disk, str(tmp_path), world_size, world_size=world_size)
    assert codes == [0] * world_size
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.steps() == [1, 2]
    verify(store.path(1))
    verify(store.path(2))


def export_on_a_full_disk(folder: str, tp: int) -> None:
    """Fail in the first of several files, when other ranks still have tensors to gather."""
    run = build(Path(folder), steps=1, tp=tp)
    student = run.config.student.path
    shape = read_model_config(student, setting="student.path")
    target = Path(folder) / "export"

    def write() -> dict[str, bytes]:
        export(run.student, shape, reference=student, target=target)
        return {file.name: file.read_bytes() for file in target.iterdir()}

    with mock.patch("poweropd_megatron.checkpoint.export.MAX_SHARD_BYTES", 3 * MAX_FILE_BYTES):
        before = write()
        assert "model-00003-of-00003.safetensors" in before
        limit_files(MAX_FILE_BYTES)
        with pytest.raises(InputError, match=r"output_dir: .* can't be written"):
            write()
        assert {file.name: file.read_bytes() for file in target.iterdir()} == before
        limit_files(resource.RLIM_INFINITY)
        dist.barrier()
        assert write() == before
    assert [entry.name for entry in Path(folder).iterdir()] == ["export"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_export_that_does_not_fit_leaves_the_one_before(world_size, tmp_path, call_on_ranks):
    codes = call_on_ranks(export_on_a_full_disk, str(tmp_path), world_size, world_size=world_size)
    assert codes == [0] * world_size
