"""A conversion that dies or finds the disk full: nothing looks complete, and the rerun ends it."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from support import qwen3_folder

from poweropd_megatron.checkpoint.store import verify
from poweropd_megatron.conversion import dist_items, to_hugging_face, to_megatron, workers
from poweropd_megatron.conversion.partial import PartialFolder
from poweropd_megatron.errors import InputError

NUM_DONE = 2
WAYS: dict[str, Callable[..., None]] = {
    "megatron": to_megatron.to_megatron,
    "hugging_face": to_hugging_face.to_hugging_face,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return a source for each way: 3 MB, so that there are several parts to convert."""
    folder = tmp_path_factory.mktemp("sources")
    qwen3_folder.write(folder / "hf", vocab_size=3001, hidden_size=128, num_files=2)
    to_megatron.to_megatron(folder / "hf", folder / "megatron")
    return {"megatron": folder / "hf", "hugging_face": folder / "megatron"}


def run_apart(function: Callable[[], Any]) -> int:
    """Return the exit code of a forked process that calls a function."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def files_of(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def convert_and_die(way: str, source: Path, output: Path, num_workers: int) -> None:
    """Die when the last of NUM_DONE parts has been recorded, while workers go on."""
    record = PartialFolder.record
    numbers = []

    def record_and_die(self: PartialFolder, part: int, file: Path, facts: dict[str, Any]) -> None:
        record(self, part, file, facts)
        numbers.append(part)
        if len(numbers) == NUM_DONE:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(PartialFolder, "record", record_and_die):
        WAYS[way](source, output, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_conversion_is_gone_on_with(way, num_workers, folders, tmp_path):
    out, straight = tmp_path / "out", tmp_path / "straight"
    WAYS[way](folders[way], straight)
    code = run_apart(lambda: convert_and_die(way, folders[way], out, num_workers))
    assert code == -signal.SIGKILL
    assert not out.exists()
    parts = []
    done = PartialFolder.begin

    def begin(self: PartialFolder, plan: dict[str, Any]) -> set[int]:
        parts.append(done(self, plan))
        return parts[-1]

    with mock.patch.object(PartialFolder, "begin", begin):
        WAYS[way](folders[way], out, num_workers=3 - num_workers)
    assert len(parts[0]) >= NUM_DONE
    found, expected = files_of(out), files_of(straight)
    assert found == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out", "straight"}
    if way == "megatron":
        verify(out / "weights")


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_was_removed_after_the_kill_is_written_again(way, folders, tmp_path):
    """As someone does who needs the room; its part is recorded as done."""
    out, straight = tmp_path / "out", tmp_path / "straight"
    WAYS[way](folders[way], straight)
    run_apart(lambda: convert_and_die(way, folders[way], out, 1))
    done = json.loads((tmp_path / ".out.partial/.journal/0.json").read_text())
    (tmp_path / ".out.partial" / done["file"]).unlink()
    WAYS[way](folders[way], out)
    assert files_of(out) == files_of(straight)


def test_what_was_done_with_another_reference_is_not_used(folders, tmp_path):
    """Its config.json says what becomes of the rows."""
    reference, out = tmp_path / "reference", tmp_path / "out"
    shutil.copytree(folders["megatron"], reference)
    convert = partial(WAYS["hugging_face"], reference=reference)
    with mock.patch.dict(WAYS, {"hugging_face": convert}):
        run_apart(lambda: convert_and_die("hugging_face", folders["hugging_face"], out, 1))
    numbers = []
    begin = PartialFolder.begin

    def note(self: PartialFolder, plan: dict[str, Any]) -> set[int]:
        numbers.append(len(begin(self, plan)))
        return begin(self, plan)

    for change, expected in (("", NUM_DONE), ("\n", 0)):
        with (reference / "config.json").open("a") as file:
            file.write(change)
        with (
            mock.patch.object(PartialFolder, "begin", note),
            mock.patch.object(workers, "run_parts", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            convert(folders["hugging_face"], out)
        assert numbers[-1] == expected


@pytest.mark.parametrize("way", WAYS)
def test_what_was_done_of_another_input_is_not_used(way, folders, tmp_path):
    """The input changes after the kill; what comes out is of the new one alone."""
    source, out = tmp_path / "source", tmp_path / "out"
    qwen3_folder.write(tmp_path / "hf", seed=5, vocab_size=3001, hidden_size=128, num_files=2)
    tensors = load_file(tmp_path / "hf" / "model-00001-of-00002.safetensors")
    os.symlink(folders[way], source)
    assert run_apart(lambda: convert_and_die(way, source, out, 1)) == -signal.SIGKILL
    source.unlink()
    if way == "megatron":
        os.symlink(tmp_path / "hf", source)
        WAYS[way](source, out)
        to_hugging_face.to_hugging_face(out, tmp_path / "again", reference=tmp_path / "hf")
    else:
        to_megatron.to_megatron(tmp_path / "hf", source)
        WAYS[way](source, out)
        to_hugging_face.to_hugging_face(source, tmp_path / "again", reference=tmp_path / "hf")
    again = load_file(tmp_path / "again" / "model-00001-of-00002.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    if way == "hugging_face":
        assert torch.equal(
            load_file(out / "model.safetensors")["model.norm.weight"],
            load_file(tmp_path / "hf/model-00002-of-00002.safetensors")["model.norm.weight"],
        )


def convert_on_a_full_disk(way: str, source: Path, output: Path, num_workers: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, resource.RLIM_INFINITY))
    with pytest.raises(InputError, match=r"--output: .*out can't be written: .*File too large"):
        WAYS[way](source, output, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_leaves_nothing_that_looks_complete(way, num_workers, folders, tmp_path):
    out = tmp_path / "out"
    assert run_apart(lambda: convert_on_a_full_disk(way, folders[way], out, num_workers)) == 0
    assert not out.exists()
    WAYS[way](folders[way], out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_takes_not_even_the_plan_is_told(way, folders, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("poweropd_megatron.conversion.partial._write", refuse)
    with pytest.raises(InputError, match=r"--output: .* can't be written: .*No space left"):
        WAYS[way](folders[way], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_conversions_to_one_folder_are_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("poweropd_megatron.conversion.partial._SECONDS_TO_WAIT", 0.1)
    write = dist_items.write_metadata

    def convert_again(*arguments: Any) -> None:
        monkeypatch.setattr(dist_items, "write_metadata", write)
        with pytest.raises(InputError, match="--output: another conversion is writing to"):
            to_megatron.to_megatron(folders["megatron"], tmp_path / "out")
        write(*arguments)

    monkeypatch.setattr(dist_items, "write_metadata", convert_again)
    to_megatron.to_megatron(folders["megatron"], tmp_path / "out")
    verify(tmp_path / "out" / "weights")
