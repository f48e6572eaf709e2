"""A rank's shards in several files: nothing is lost, and a thread's error is the save's."""

import errno
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint import filesystem

from poweropd_megatron.checkpoint import sharded
from poweropd_megatron.checkpoint.store import CheckpointStore, read_manifest
from poweropd_megatron.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("layout")
SIZES = [7, 300, 1, 512, 40, 200, 33, 64]


def made(value: float) -> dict[str, Any]:
    return {
        "model": {
            str(number): ShardedTensor.from_rank_offsets(
                f"weight.{number}", torch.arange(size).float() + value
            )
            for number, size in enumerate(SIZES)
        },
        "run": {"step": 3},
    }


@pytest.mark.parametrize(("file_bytes", "num_files"), [(10**9, 1), (2000, 3), (500, 8), (1, 8)])
def test_what_is_read_is_what_was_saved_in_however_many_files(
    file_bytes: int, num_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process is started for it: a started one would import the program again."""
    monkeypatch.setattr(sharded, "FILE_BYTES", file_bytes)
    monkeypatch.setattr(BaseProcess, "start", lambda self: pytest.fail(f"{self} is started"))
    checkpoint = sharded.save(made(1.5), CheckpointStore(tmp_path), 3)
    files = {name for name in read_manifest(checkpoint) if name.endswith(".distcp")}
    assert len(files) == num_files
    sharded.verify_together(checkpoint)
    loaded = sharded.load(made(0), checkpoint)
    for number, size in enumerate(SIZES):
        assert torch.equal(loaded["model"][str(number)], torch.arange(size) + 1.5)
    assert sharded.load_common(checkpoint)["run"] == {"step": 3}


def test_files_are_about_as_large_as_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded, "FILE_BYTES", 10**5)
    state = {
        str(number): ShardedTensor.from_rank_offsets(f"weight.{number}", torch.zeros(10**4))
        for number in range(12)
    }
    checkpoint = sharded.save({"model": state}, CheckpointStore(tmp_path), 1)
    sizes = [file.stat().st_size for file in checkpoint.glob("*.distcp")]
    assert len(sizes) == 5
    assert max(sizes) < 1.6 * min(sizes)


def test_an_error_in_one_of_the_threads_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_item = filesystem._write_item

    def full(transforms: Any, stream: Any, data: Any, item: Any, *others: Any) -> Any:
        if item.index.fqn == "weight.4":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_item(transforms, stream, data, item, *others)

    monkeypatch.setattr(sharded, "FILE_BYTES", 500)
    monkeypatch.setattr(filesystem, "_write_item", full)
    with pytest.raises(
        CheckpointError, match=r"step 3 can't be written: .*No space left on device"
    ):
        sharded.save(made(1.5), CheckpointStore(tmp_path), 3)
    assert list(tmp_path.iterdir()) == []
