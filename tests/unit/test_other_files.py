"""What travels beside the weights: every other file, and config.json with the tensors' type."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import qwen3_folder
from support.changed_config import config_with
from support.edited_folder import edit_json

from poweropd_megatron.conversion.to_hugging_face import to_hugging_face
from poweropd_megatron.conversion.to_megatron import to_megatron
from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.other_files import copy_other_files
from poweropd_megatron.train.inputs import read_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    qwen3_folder.write(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("other", ["float32", None])
def test_every_spelling_of_the_type_is_rewritten(other, folder, tmp_path):
    edit_json(folder, "config.json", dtype=other)
    to_megatron(folder, tmp_path / "megatron", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "megatron" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    read_model_config(tmp_path / "megatron", setting="test")


WEIGHTS = (
    *("original/consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx"),
    *("onnx/model.onnx_data", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
    *("deep/er/adapter.safetensors", "model.safetensors.index.json", "rust_model.ot", "q4.gguf"),
)
OTHERS = ("original/params.json", "onnx/config.json", "deep/er/README.md", "linked/chat.jinja")


def test_all_files_but_weights_of_any_kind_are_copied_at_any_depth(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    for name in (*WEIGHTS, *OTHERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "copy").mkdir()
    copy_other_files(folder, tmp_path / "copy", dtype=torch.float32, setting="test")
    copies = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    names = {str(path.relative_to(tmp_path / "copy")) for path in copies}
    assert names == {"config.json", *OTHERS}
    assert all((tmp_path / "copy" / name).read_text() == name for name in OTHERS)


def link_to_nothing_behind_a_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "notes.md").symlink_to("nowhere")
    (folder / "figures").mkdir()
    (folder / "figures" / "linked").symlink_to("../../elsewhere")


def loop_through_elsewhere(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "back").symlink_to(folder)
    (folder / "linked").symlink_to("../elsewhere")


TAKEN = "has a name that a conversion gives to a folder of its own: rename or remove it"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "link to nothing": (
        lambda folder: (folder / "vocab.json").symlink_to("nowhere"),
        "vocab.json links to nowhere, which is missing",
    ),
    "link to nothing behind a link": (
        link_to_nothing_behind_a_link,
        r"figures/linked/notes\.md links to nowhere, which is missing",
    ),
    "link to itself": (
        lambda folder: (folder / "again").symlink_to("."),
        "again links to .*hf, a folder that it lies in: remove the link",
    ),
    "link to a parent": (
        lambda folder: (folder / "up").symlink_to("../.."),
        "up links to .*, a folder that it lies in: remove the link",
    ),
    "links in a ring": (loop_through_elsewhere, "linked/back links to .*hf, a folder that it"),
    "pipe": (lambda folder: os.mkfifo(folder / "pipe"), "pipe is neither a file nor a folder"),
    "file weights": (lambda folder: (folder / "weights").write_text("mine"), f"weights {TAKEN}"),
    "file release": (lambda folder: (folder / "release").write_text("mine"), f"release {TAKEN}"),
    "folder weights": (lambda folder: (folder / "weights").mkdir(), f"weights {TAKEN}"),
    "folder release": (lambda folder: (folder / "release").mkdir(), f"release {TAKEN}"),
    "folder .journal": (lambda folder: (folder / ".journal").mkdir(), f"journal {TAKEN}"),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted")
    qwen3_folder.write(path / "hf")
    to_megatron(path / "hf", path / "megatron")
    return path / "megatron"


@pytest.mark.parametrize("name", FAULTS)
def test_what_cant_be_copied_is_refused_before_anything_is_written(
    name, folder, converted, tmp_path
):
    spoil, message = FAULTS[name]
    spoil(folder)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=f"--input: .*{message}") as caught:
        to_megatron(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"--reference: .*{message}"):
        to_hugging_face(converted, tmp_path / "out", reference=folder)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_run_tells_before_it_begins_what_its_export_cant_copy(folder, converted):
    link_to_nothing_behind_a_link(folder)
    config = config_with(student__path=str(folder), teacher__path=str(converted))
    with pytest.raises(InputError, match=r"student\.path: .*linked/notes\.md links to nowhere"):
        read_inputs(config, world_size=1)


def test_what_a_conversion_made_is_left_out_in_any_state(converted, tmp_path):
    """With the link as it is, as a copy of the folder (cp -rL), and with the weights gone."""
    shutil.copytree(converted, tmp_path / "followed")
    shutil.copytree(converted, tmp_path / "gone", symlinks=True)
    shutil.rmtree(tmp_path / "gone" / "weights")
    for number, reference in enumerate((converted, tmp_path / "followed", tmp_path / "gone")):
        out = tmp_path / f"out{number}"
        to_hugging_face(converted, out, reference=reference)
        assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}


def test_the_other_files_need_room_too(folder, converted, tmp_path, monkeypatch):
    with (folder / "video.mp4").open("wb") as file:
        file.truncate(10**9)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"--output: 1\.000 GB are to be written"):
        to_megatron(folder, tmp_path / "out")
    with pytest.raises(InputError, match=r"--output: 1\.000 GB are to be written"):
        to_hugging_face(converted, tmp_path / "out", reference=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
