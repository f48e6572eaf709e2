"""What is wrong with a damaged folder is named, by `inspect` as by `verify`."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.model_folders import INDEX, add, change_json, change_tensor, drop, said, write_all


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders without faults, in both formats; not to be changed."""
    return write_all(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def copy(sound: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies one of them, to be damaged."""
    return lambda name: Path(shutil.copytree(sound[name], tmp_path / name))


def misplace(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    places = index["weight_map"]
    places["lm_head.weight"] = next(f for f in places.values() if f != places["lm_head.weight"])
    (folder / INDEX).write_text(json.dumps(index))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing tensor": (
        "untied",
        lambda folder: drop(folder, "model.norm.weight"),
        "1 tensors are missing: model.norm.weight",
    ),
    "missing head": ("untied", lambda folder: drop(folder, "lm_head.weight"), "missing: lm_head"),
    "unexpected tensor": (
        "untied",
        lambda folder: add(folder, bias=torch.zeros(3)),
        "1 tensors are unexpected: bias",
    ),
    "layers beyond": (
        "untied",
        lambda folder: change_json(folder / "config.json", num_hidden_layers=1),
        "11 tensors are unexpected: model.layers.1.",
    ),
    "layers beyond all bounds": (
        "untied",
        lambda folder: change_json(folder / "config.json", num_hidden_layers=10**9),
        "config.json describes 1000000000 layers, but all the folder has is 25 tensors",
    ),
    "experts beyond all bounds": (
        "experts",
        lambda folder: change_json(folder / "config.json", num_experts=10**9),
        "config.json describes 2 layers of 1000000000 experts, but all the folder has is",
    ),
    "other shape": (
        "untied",
        lambda folder: change_tensor(folder, "lm_head.weight", lambda tensor: tensor[1:]),
        "lm_head.weight has the shape (52, 48), but the model's is (53, 48)",
    ),
    "other type": (
        "untied",
        lambda folder: change_json(folder / "config.json", torch_dtype="bfloat16"),
        "config.json states bfloat16, the tensors are float32",
    ),
    "a list as the type": (
        "untied",
        lambda folder: change_json(folder / "config.json", torch_dtype=["float32"]),
        "config.json states ['float32'], the tensors are float32",
    ),
    "truncated": (
        "untied",
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-1]
        ),
        "model.safetensors can't be read",
    ),
    "no weights": (
        "untied",
        lambda folder: (folder / "model.safetensors").unlink(),
        "no *.safetensors file",
    ),
    "no config": (
        "untied",
        lambda folder: (folder / "config.json").unlink(),
        "config.json is missing",
    ),
    "missing file": (
        "files",
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        f"model-00002-of-00003.safetensors is missing, though {INDEX} names it",
    ),
    "file beyond the index": (
        "files",
        lambda folder: save_file({"x": torch.ones(1)}, folder / "stray.safetensors"),
        f"stray.safetensors is not in {INDEX}",
    ),
    "misplaced tensor": ("files", misplace, f"though {INDEX} says so: lm_head.weight"),
    "index of nothing": (
        "files",
        lambda folder: (folder / INDEX).write_text("{}"),
        f"{INDEX} has no weight_map of tensors to files",
    ),
    "wrong total": (
        "files",
        lambda folder: change_json(folder / INDEX, metadata={"total_size": 12}),
        f"{INDEX} states total_size 12, the tensors have",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_hugging_face_folder_is_named(
    damage: str, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, message = DAMAGES[damage]
    folder = copy(name)
    change(folder)
    for command in ("inspect", "verify"):
        code, output = said(capsys, command, folder)
        assert code == 2
        assert message in output
        assert "complete    no" in output


def weights(folder: Path) -> Path:
    return folder / "weights"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def forget_a_place(folder: Path) -> None:
    metadata = pickle.loads((weights(folder) / ".metadata").read_bytes())
    metadata.storage_data.popitem()
    metadata.storage_data.pop(next(iter(metadata.storage_data)))
    (weights(folder) / ".metadata").write_bytes(pickle.dumps(metadata))


STORED_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metadata": (lambda folder: (weights(folder) / ".metadata").unlink(), "is missing"),
    "broken metadata": (
        lambda folder: (weights(folder) / ".metadata").write_bytes(b"x"),
        ".metadata can't be read",
    ),
    "missing file": (lambda folder: next(weights(folder).glob("*.distcp")).unlink(), "is missing"),
    "truncated file": (
        lambda folder: cut(next(weights(folder).glob("*.distcp"))),
        "was not written completely",
    ),
    "other layers": (
        lambda folder: change_json(folder / "config.json", num_hidden_layers=3),
        "has the shape (2, 48), but the model's is (3, 48)",
    ),
    "stray file": (
        lambda folder: (weights(folder) / "__9_9.distcp").write_bytes(b"x"),
        "__9_9.distcp is a stray: .metadata has nothing in it",
    ),
    "other type": (
        lambda folder: change_json(folder / "config.json", torch_dtype="bfloat16"),
        "config.json states bfloat16, the tensors are float32",
    ),
    "metadata that calls nothing": (
        lambda folder: (weights(folder) / ".metadata").write_bytes(b"\x80\x04\x8c\x02\xda\xda."),
        ".metadata can't be read: UnicodeDecodeError",
    ),
    "piece at no place": (forget_a_place, ".metadata doesn't say where"),
    "tied": (
        lambda folder: change_json(folder / "config.json", tie_word_embeddings=True),
        "unexpected: output_layer.weight",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "nothing says which model it is",
    ),
}


@pytest.mark.parametrize("damage", STORED_DAMAGES)
def test_what_is_wrong_with_a_converted_folder_is_named(
    damage: str, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = STORED_DAMAGES[damage]
    folder = copy("untied-converted")
    change(folder)
    for command in ("inspect", "verify"):
        code, output = said(capsys, command, folder)
        assert code == 2
        assert message in output
