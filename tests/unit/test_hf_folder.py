"""Reading tensors of a Hugging Face folder, and every way in which one can be unusable."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import qwen3_folder

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.hf_folder import INDEX_NAME, HFFolder

SETTING = "teacher.path"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("num_files", [1, 3])
def test_tensors_are_read_whole_and_in_slices_from_one_or_several_files(
    tmp_path: Path, num_files: int
) -> None:
    tensors = qwen3_folder.write(tmp_path, num_files=num_files)
    folder = HFFolder(tmp_path, setting=SETTING)
    assert folder.names() == tensors.keys()
    for name, tensor in tensors.items():
        assert folder.shape(name) == tuple(tensor.shape)
        assert torch.equal(folder.read(name), tensor)
    whole = tensors[Q_PROJ]
    assert torch.equal(folder.read(Q_PROJ, dim=0, start=16, length=32), whole[16:48])
    assert torch.equal(folder.read(Q_PROJ, dim=1, start=5, length=7), whole[:, 5:12])
    assert folder.read(Q_PROJ, dim=0, start=whole.shape[0], length=0).shape == (0, whole.shape[1])


def test_files_without_an_index_are_all_read(tmp_path: Path) -> None:
    tensors = qwen3_folder.write(tmp_path, num_files=2)
    (tmp_path / INDEX_NAME).unlink()
    folder = HFFolder(tmp_path, setting=SETTING)
    assert folder.names() == tensors.keys()
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    tensors = qwen3_folder.write(tmp_path, num_files=2)
    (tmp_path / INDEX_NAME).unlink()
    save_file({Q_PROJ: tensors[Q_PROJ]}, tmp_path / "old.safetensors")
    with pytest.raises(InputError, match=rf"^{SETTING}: {Q_PROJ} is in .* and in .*/old\."):
        HFFolder(tmp_path, setting=SETTING)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^{SETTING}: {tmp_path}/nowhere is not a folder$"):
        HFFolder(tmp_path / "nowhere", setting=SETTING)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=rf"^{SETTING}: no \*\.safetensors file in {tmp_path}$"):
        HFFolder(tmp_path, setting=SETTING)


@pytest.mark.parametrize("kept_bytes", [0, 7, 100, -1], ids=lambda n: f"{n} bytes")
def test_a_truncated_file_is_named_before_anything_is_read(tmp_path: Path, kept_bytes: int) -> None:
    qwen3_folder.write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(InputError, match=rf"^{SETTING}: {file} can't be read: "):
        HFFolder(tmp_path, setting=SETTING)


def test_a_truncated_file_behind_an_index_is_named_before_anything_is_read(tmp_path: Path) -> None:
    qwen3_folder.write(tmp_path, num_files=2)
    weight_map = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    file = tmp_path / weight_map[Q_PROJ]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=rf"^{SETTING}: {file} can't be read: "):
        HFFolder(tmp_path, setting=SETTING)


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 800632\n")
    with pytest.raises(InputError, match=rf"^{SETTING}: {file} can't be read: "):
        HFFolder(tmp_path, setting=SETTING)


def test_an_index_that_names_an_absent_file_is_refused(tmp_path: Path) -> None:
    qwen3_folder.write(tmp_path, num_files=3)
    absent = tmp_path / "model-00002-of-00003.safetensors"
    absent.unlink()
    with pytest.raises(InputError, match=rf"^{SETTING}: {absent} is missing$"):
        HFFolder(tmp_path, setting=SETTING)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "can't be read as JSON"),
        ("[]", "holds a list, expected an object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "places a in 1, expected the name of a "),
        ('{"weight_map": {"a": ["b"]}}', r"places a in \['b'\], expected the name"),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"places a in '\.\./b\.safetensors', exp"),
        ('{"weight_map": {"a": "b.bin"}}', r"places a in 'b\.bin', expected the name"),
        ("[" * 100_000, "can't be read as JSON: maximum recursion depth"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, content: str, problem: str) -> None:
    qwen3_folder.write(tmp_path)
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(InputError, match=rf"^{SETTING}: {tmp_path / INDEX_NAME} {problem}"):
        HFFolder(tmp_path, setting=SETTING)


def test_a_tensor_that_the_index_promises_but_its_file_lacks_is_refused(tmp_path: Path) -> None:
    tensors = qwen3_folder.write(tmp_path)
    index = {"weight_map": dict.fromkeys([*tensors, "lm_head.bias"], "model.safetensors")}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model\.safetensors has no tensor lm_head\.bias, though"):
        HFFolder(tmp_path, setting=SETTING)


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    qwen3_folder.write(tmp_path)
    folder = HFFolder(tmp_path, setting=SETTING)
    with pytest.raises(InputError, match=rf"^{SETTING}: {tmp_path} has no tensor lm_head\.bias$"):
        folder.read("lm_head.bias")
    with pytest.raises(InputError, match=r"has no tensor lm_head\.bias"):
        folder.shape("lm_head.bias")
