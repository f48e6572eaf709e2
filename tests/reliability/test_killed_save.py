"""A process that dies while it saves: the checkpoint before stays the newest, and loads bitwise."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from small_run import build, differences, state_of, train_and_save
from torch.distributed.checkpoint import filesystem

from poweropd_megatron.checkpoint import store as store_module
from poweropd_megatron.checkpoint.store import CheckpointStore, digest, verify


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        die()

    return call


def on_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that dies at its n-th call and until then does what it did."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return die() if calls == number else function(*args, **kwargs)

    return call


def half_a_manifest(content: Any, file: Any, **options: Any) -> None:
    text = json.dumps(content, **options)
    file.write(text[: len(text) // 2])
    file.flush()
    die()


def at_publishing(*, dies_before: bool) -> Callable[..., Any]:
    """Return Path.rename, but for the death before or after a checkpoint gets its name."""
    rename = Path.rename

    def call(path: Path, target: Path) -> None:
        is_checkpoint = target.name == "step_000002"
        if is_checkpoint and dies_before:
            die()
        rename(path, target)
        if is_checkpoint:
            die()

    return call


POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "after begin": (CheckpointStore, "begin", after(CheckpointStore.begin)),
    "in the middle of a file": (filesystem, "_write_item", on_call(5, filesystem._write_item)),
    "before a file is on the disk": (os, "fsync", die),
    "before the index is on the disk": (os, "fsync", on_call(2, os.fsync)),
    "after the files": (CheckpointStore, "publish", die),
    "in the middle of the manifest": (store_module.json, "dump", half_a_manifest),
    "before the rename": (Path, "rename", at_publishing(dies_before=True)),
}
"""Where the process dies, and what is put in whose place for that; no step 2 may be seen then."""


def save_twice(folder: str, point: str) -> None:
    """Save step 1, then die while saving step 2."""
    run = build(Path(folder), steps=1)
    train_and_save(run, first_step=1)
    torch.save(state_of(run), Path(folder) / "state.pt")
    owner, name, replacement = POINTS[point]
    with mock.patch.object(owner, name, replacement):
        run.state.save(2)


def resume(folder: str) -> None:
    """Fail unless the newest checkpoint is that of step 1, bitwise, and training goes on."""
    run = build(Path(folder), steps=2)
    assert run.state.load_latest() == 1
    assert differences(torch.load(Path(folder) / "state.pt"), state_of(run)) == []
    train_and_save(run, first_step=2)


def hashes(folder: Path) -> dict[str, str]:
    return {str(file): digest(file) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("point", POINTS)
def test_after_a_kill_the_checkpoint_before_is_the_newest_and_loads_bitwise(
    point, tmp_path, call_on_ranks
):
    assert call_on_ranks(save_twice, str(tmp_path), point) == [-signal.SIGKILL]
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.steps() == [1]
    assert store.partial(2).is_dir(), "it died before or after the save"
    first = hashes(store.path(1))

    assert call_on_ranks(resume, str(tmp_path)) == [0]
    assert hashes(store.path(1)) == first
    assert sorted(entry.name for entry in store.root.iterdir()) == ["step_000001", "step_000002"]
    verify(store.path(2))


def die_on_one_rank(folder: str) -> None:
    run = build(Path(folder), steps=1, tp=2)
    train_and_save(run, first_step=1)
    if dist.get_rank() == 1:
        filesystem._write_item = on_call(5, filesystem._write_item)
    run.state.save(2)


def load_step_1(folder: str) -> None:
    assert build(Path(folder), steps=2, tp=2).state.load_latest() == 1


def test_one_rank_that_dies_in_a_save_takes_no_checkpoint_with_it(tmp_path, call_on_ranks):
    codes = call_on_ranks(die_on_one_rank, str(tmp_path), world_size=2)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [1]
    assert call_on_ranks(load_step_1, str(tmp_path), world_size=2) == [0, 0]


def publish(folder: str, point: str) -> None:
    """Die after step 2 is visible: at once, or while the checkpoint before is being deleted."""
    run = build(Path(folder), steps=1)
    train_and_save(run, first_step=1)
    torch.save(state_of(run), Path(folder) / "state.pt")
    if point == "after the rename":
        Path.rename = at_publishing(dies_before=False)
    run.state.save(2)
    shutil.rmtree = die
    run.checkpoints.prune(1)


def load_step_2(folder: str) -> None:
    run = build(Path(folder), steps=2)
    assert run.state.load_latest() == 2
    assert differences(torch.load(Path(folder) / "state.pt"), state_of(run)) == []


@pytest.mark.parametrize(("point", "visible"), [("after the rename", [1, 2]), ("in a delete", [2])])
def test_what_was_renamed_is_complete_whatever_dies_afterwards(
    point, visible, tmp_path, call_on_ranks
):
    assert call_on_ranks(publish, str(tmp_path), point) == [-signal.SIGKILL]
    assert CheckpointStore(tmp_path / "checkpoints").steps() == visible
    assert call_on_ranks(load_step_2, str(tmp_path)) == [0]
