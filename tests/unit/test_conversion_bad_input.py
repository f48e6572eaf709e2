"""What can't be converted is refused by file and tensor, before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import qwen3_folder
from support.converted_folder import global_tensors
from support.edited_folder import add_to_index, edit, edit_json
from support.stored_checkpoint import write_in_pieces

from poweropd_megatron.conversion import workers
from poweropd_megatron.conversion.to_hugging_face import to_hugging_face
from poweropd_megatron.conversion.to_megatron import to_megatron
from poweropd_megatron.errors import InputError

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    edit(folder, FIRST, lambda tensors: tensors.update({name: tensor}))
    add_to_index(folder, name, FIRST)


def truncate(folder: Path) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:-100])


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].T.contiguous()


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = tensors[NORM].bfloat16()


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing"),
    "truncated file": (truncate, f"{SECOND} can't be read"),
    "not safetensors": (lambda f: (f / SECOND).write_bytes(b"x" * 99), f"{SECOND} can't be read"),
    "wrong shape": (
        lambda f: edit(f, FIRST, transpose),
        rf"{FIRST}: {Q_PROJ} has the shape \(48, 64\), but config.json implies \(64, 48\)",
    ),
    "index naming an absent tensor": (
        lambda f: add_to_index(f, "model.layers.9.mlp.up_proj.weight", FIRST),
        f"{FIRST} has no tensor model.layers.9.mlp.up_proj.weight",
    ),
    "tensor missing": (
        lambda f: edit_json(f, "config.json", num_hidden_layers=3),
        "has no tensor model.layers.2.input_layernorm.weight",
    ),
    "layers beyond all bounds": (
        lambda f: edit_json(f, "config.json", num_hidden_layers=10**9),
        "config.json describes 1000000000 layers, but all the folder has is 25 tensors",
    ),
    "tensor that the index doesn't name": (
        lambda f: edit(f, FIRST, lambda t: t.update(extra=torch.zeros(2))),
        f"{FIRST} has a tensor extra, which model.safetensors.index.json doesn't name",
    ),
    "tensor in two files of the index": (
        lambda f: edit(f, SECOND, lambda t: t.update({EMBEDDING: torch.zeros(53, 48)})),
        f"{SECOND} has a tensor {EMBEDDING}, which model.safetensors.index.json places in {FIRST}",
    ),
    "unknown tensor": (
        lambda f: add(f, "model.layers.0.self_attn.q_proj.bias", torch.zeros(64)),
        f"{FIRST} has a tensor model.layers.0.self_attn.q_proj.bias",
    ),
    "FP8 scales": (
        lambda f: add(f, Q_PROJ + "_scale_inv", torch.zeros(1)),
        f"{FIRST} has a tensor {Q_PROJ}_scale_inv",
    ),
    "FP8 tensor": (
        lambda f: edit(f, FIRST, lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.float8_e4m3fn)})),
        f"{FIRST}: {Q_PROJ} is F8_E4M3",
    ),
    "two types of one parameter": (
        lambda f: edit(f, SECOND, widen),
        "which decoder.layers.self_attention.linear_qkv.layer_norm_weight stores with it",
    ),
    "unknown model type": (
        lambda f: edit_json(f, "config.json", model_type="mamba"),
        "config.json: has model_type 'mamba'",
    ),
    "rope scaling": (
        lambda f: edit_json(f, "config.json", rope_scaling={"rope_type": "yarn", "factor": 4}),
        "yarn",
    ),
    "sliding window": (
        lambda f: edit_json(f, "config.json", use_sliding_window=True),
        "use_sliding_window",
    ),
    "attention bias": (
        lambda f: edit_json(f, "config.json", attention_bias=True),
        "attention_bias",
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "index that leads out of the folder": (
        lambda f: add_to_index(f, Q_PROJ, "../" + FIRST),
        rf"places {Q_PROJ} in '\.\./{FIRST}', expected the name of a \*\.safetensors file in",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_is_no_whole_model_is_refused(name, tmp_path):
    spoil, message = BAD_FOLDERS[name]
    qwen3_folder.write(tmp_path / "hf", num_files=2)
    spoil(tmp_path / "hf")
    with pytest.raises(InputError, match=message) as caught:
        to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert str(caught.value).startswith("--input: ")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path):
    tensors = qwen3_folder.write(tmp_path / "hf", tie_word_embeddings=True)
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    qwen3_folder.write_tensors(tmp_path / "hf", tensors | {"lm_head.weight": head})
    with pytest.raises(InputError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        to_megatron(tmp_path / "hf", tmp_path / "megatron")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Return a Hugging Face folder and what it was converted to."""
    folder = tmp_path_factory.mktemp("converted")
    qwen3_folder.write(folder / "hf")
    to_megatron(folder / "hf", folder / "megatron")
    return folder / "hf", folder / "megatron"


@pytest.mark.parametrize("output", ["hf/inside", "hf", "."])
def test_an_output_that_lies_in_the_input_or_around_it_is_refused(output, tmp_path):
    qwen3_folder.write(tmp_path / "hf")
    with pytest.raises(InputError, match=r"--output: .* lie in one another"):
        to_megatron(tmp_path / "hf", tmp_path / output)


def test_an_output_in_the_reference_is_refused(converted):
    reference, megatron = converted
    with pytest.raises(InputError, match=r"--output: .* --reference .* lie in one another"):
        to_hugging_face(megatron, reference / "out", reference=reference)


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_an_output_that_exists_is_left_alone(kind, converted, tmp_path):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nothing")
    for convert, source in zip((to_megatron, to_hugging_face), converted, strict=True):
        with pytest.raises(InputError, match=r"--output: .*out exists already"):
            convert(source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_below_a_file_is_refused(converted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output: .* can't be made"):
        to_megatron(converted[0], tmp_path / "file" / "out")


def test_too_little_room_is_told_before_anything_is_written(converted, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for convert, source in zip((to_megatron, to_hugging_face), converted, strict=True):
        with pytest.raises(InputError, match=r"--output: .* GB left: free some"):
            convert(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda f: (f / "__0_1.distcp").unlink(), "__0_1.distcp is missing"),
    "truncated file": (
        lambda f: (f / "__0_1.distcp").write_bytes((f / "__0_1.distcp").read_bytes()[:-2000]),
        "__0_1.distcp was not written completely: .* is cut off",
    ),
    "no metadata": (
        lambda f: (f / ".metadata").unlink(),
        r"\.metadata is missing; expected a torch_dist folder",
    ),
    "metadata that isn't": (
        lambda f: (f / ".metadata").write_bytes(b"nothing"),
        r"\.metadata can't be read",
    ),
    "garbage in a file": (
        lambda f: (f / "__0_1.distcp").write_bytes(bytes((f / "__0_1.distcp").stat().st_size)),
        "__0_1.distcp holds at byte 0 nothing that torch.save wrote",
    ),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_checkpoint_that_is_not_whole_is_refused(name, num_workers, converted, tmp_path):
    spoil, message = BAD_CHECKPOINTS[name]
    shutil.copytree(converted[1], tmp_path / "megatron", symlinks=True)
    spoil(tmp_path / "megatron" / "weights")
    with pytest.raises(InputError, match=message):
        to_hugging_face(tmp_path / "megatron", tmp_path / "out", num_workers=num_workers)
    assert not (tmp_path / "out").exists()


def layers_as_others_have_them(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor[:1] if "layers" in key else tensor for key, tensor in stored.items()}


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "other layers": (
        lambda t: t.update(layers_as_others_have_them(t)),
        r"decoder\.layers\.\S+ has the shape \(1, .*implies \(2, ",
    ),
    "fewer tokens": (
        lambda t: t.update({"output_layer.weight": t["output_layer.weight"][:-1]}),
        r"output_layer.weight has the shape \(52, 48\).*implies \(53, 48\)",
    ),
    "no head": (lambda t: t.pop("output_layer.weight"), "has no tensor output_layer.weight"),
    "a bias": (
        lambda t: t.update({"decoder.layers.self_attention.linear_qkv.bias": torch.zeros(2, 128)}),
        "has a tensor decoder.layers.self_attention.linear_qkv.bias",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_checkpoint_of_another_model_is_refused(name, converted, tmp_path):
    change, message = BAD_TENSORS[name]
    stored = global_tensors(converted[0])
    change(stored)
    write_in_pieces(tmp_path / "weights", stored, {})
    with pytest.raises(InputError, match=message):
        to_hugging_face(tmp_path / "weights", tmp_path / "out", reference=converted[0])
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_alone_needs_a_reference(converted, tmp_path):
    with pytest.raises(InputError, match=r"--reference: .*has no config.json; name the"):
        to_hugging_face(converted[1] / "weights", tmp_path / "out")


def test_a_runs_folder_names_its_checkpoints(converted, tmp_path):
    shutil.copytree(converted[1] / "weights", tmp_path / "run" / "checkpoints" / "step_000020")
    with pytest.raises(InputError, match=r"name one of its checkpoints, such as .*step_000020"):
        to_hugging_face(tmp_path / "run", tmp_path / "out", reference=converted[0])


def test_a_reference_with_other_tensors_is_refused(converted, tmp_path):
    shutil.copytree(converted[0], tmp_path / "hf")
    edit(tmp_path / "hf", "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"--reference: .* has no tensor lm_head.weight"):
        to_hugging_face(converted[1], tmp_path / "out", reference=tmp_path / "hf")


@pytest.mark.parametrize("place", ["../model.safetensors", "/tmp/x.safetensors", "a/b", 7])
def test_an_index_that_leads_out_of_the_folder_is_refused(place, converted, tmp_path):
    shutil.copytree(converted[0], tmp_path / "hf")
    index = {"weight_map": {"lm_head.weight": place}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="has no weight_map of names to file names"):
        to_hugging_face(converted[1], tmp_path / "out", reference=tmp_path / "hf")


def test_a_worker_that_is_killed_is_told(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "exit_if_abandoned", lambda _: workers.os._exit(9))
    monkeypatch.setattr("poweropd_megatron.conversion.to_hugging_face._job_bytes", lambda _: 1000)
    with pytest.raises(InputError, match="--workers: one of them ended with code 9"):
        to_hugging_face(converted[1], tmp_path / "out", num_workers=2)
