"""What a folder is and what is wrong with it, and whether two folders hold the same weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_folders import INDEX, KINDS, add, change_json, change_tensor, said, write_all

from poweropd_megatron.cli.main import main
from poweropd_megatron.inspection.findings import Findings
from poweropd_megatron.inspection.folder import examine


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders without faults, in both formats; not to be changed."""
    return write_all(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def copy(sound: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies one of them, to be damaged."""
    return lambda name: Path(shutil.copytree(sound[name], tmp_path / name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["", "-converted"])
def test_a_sound_folder_has_no_problems_and_its_model_and_size_are_found(
    sound: dict[str, Path], kind: str, suffix: str
) -> None:
    findings = examine(sound[kind + suffix])
    assert findings.problems == []
    assert findings.kind == ("megatron" if suffix else "hugging-face")
    assert findings.model is not None
    assert findings.model.num_layers == 2
    assert findings.dtypes.keys() == {"float32"}
    tensors = load_file(sound[kind] / "model.safetensors").values()
    assert findings.num_parameters == sum(tensor.numel() for tensor in tensors)
    assert findings.num_bytes == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_both_formats_have_the_same_digests(
    sound: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted, file = sound[f"{kind}-converted"], tmp_path / "manifest.json"
    code, output = said(capsys, "verify", converted, "--against", sound[kind], "--write", file)
    num_tensors = len(load_file(sound[kind] / "model.safetensors"))
    assert code == 0, output
    assert f"{sound[kind]}: equal in all of {num_tensors} tensors" in output
    code, output = said(capsys, "verify", sound[kind], "--against", file)
    assert code == 0, output
    assert json.loads(file.read_text())["model_sha256"] in output


def test_a_difference_is_named_with_its_size(
    copy: Callable[[str], Path], sound: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("untied")
    name = "model.layers.1.self_attn.k_proj.weight"

    def nudge(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] += 0.5
        return tensor

    change_tensor(folder, name, nudge)
    for other in ("untied", "untied-converted"):
        code, output = said(capsys, "verify", folder, "--against", sound[other])
        assert code == 2
        assert "differs in 1 of 25 tensors" in output
        assert f"{name}: other values: 1 of 1536 elements, by at most 0.5" in output


def test_another_type_is_a_difference(
    copy: Callable[[str], Path], sound: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("untied")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / "model.safetensors")
    change_json(folder / "config.json", torch_dtype="bfloat16")
    code, output = said(capsys, "verify", folder, "--against", sound["untied"])
    assert code == 2
    assert "differs in 25 of 25 tensors" in output
    assert "lm_head.weight: is bfloat16, expected float32" in output
    assert "and 20 more tensors" in output


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(
    value: float, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("untied")
    change_tensor(folder, "model.norm.weight", lambda tensor: tensor.fill_(value))
    code, output = said(capsys, "verify", folder)
    assert code == 2
    assert "1 tensors hold NaN or infinity: model.norm.weight" in output


def test_a_tied_head_that_is_stored_must_be_the_embedding(
    copy: Callable[[str], Path], sound: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("tied")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    add(folder, **{"lm_head.weight": embedding.clone()})
    code, output = said(capsys, "verify", folder, "--against", sound["tied-converted"])
    assert code == 0, output
    assert "stored though it is tied; equal to the embedding" in output
    add(folder, **{"lm_head.weight": embedding + 1})
    code, output = said(capsys, "verify", folder)
    assert code == 2
    assert "lm_head.weight differs from model.embed_tokens.weight, to which it is tied" in output


def test_an_index_of_the_right_size_is_sound(copy: Callable[[str], Path]) -> None:
    folder = copy("files")
    assert examine(folder).problems == []
    size = examine(folder).num_bytes
    change_json(folder / INDEX, metadata={"total_size": size})
    findings = examine(folder)
    assert (findings.problems, len(findings.files)) == ([], 3)


def test_a_reference_says_the_model_where_the_checkpoint_does_not(
    copy: Callable[[str], Path], sound: dict[str, Path]
) -> None:
    folder = copy("untied-converted")
    (folder / "config.json").unlink()
    findings: Findings = examine(folder / "weights", reference=sound["untied"])
    assert findings.problems == []
    assert findings.model == examine(sound["untied"]).model


def test_json_has_what_the_text_says(
    sound: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = said(capsys, "inspect", sound["experts"], "--json")
    found = json.loads(output)
    assert code == 0
    assert (found["kind"], found["complete"], found["problems"]) == ("hugging-face", True, [])
    assert found["model"]["experts"]["num_moe_experts"] == 4
    assert found["num_tensors"] == 9 * 2 + 2 * 3 * 4 + 3
    assert found["dtypes"] == {"float32": found["num_tensors"]}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("mp_rank_00/model.pt", "legacy format"),
        ("pytorch_model.bin", "*.bin weights, which are not supported"),
        ("readme.txt", "is neither a Hugging Face folder"),
    ],
)
def test_a_folder_of_another_kind_is_refused(
    file: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    code, output = said(capsys, "inspect", tmp_path)
    assert code == 2
    assert message in output
    assert main(["inspect", str(tmp_path / "none")]) == 2


def test_arguments_that_cannot_work_are_refused_before_the_weights_are_read(
    sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken.json"
    taken.touch()
    for arguments, message in (
        (["--write", taken], "taken.json exists already"),
        (["--token-ids", "1,2"], "--token-ids has no effect without --logits"),
        (["--against", tmp_path / "none"], "none is not a folder"),
    ):
        code, output = said(capsys, "verify", sound["untied"], *arguments)
        assert code == 2
        assert message in output
