"""What a folder is and what is wrong with it, and whether two folders hold the same weights."""

import fractions
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import converted_folder
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
        (["--against", tmp_path / "none"], "none can't be read as a manifest"),
    ):
        code, output = said(capsys, "verify", sound["untied"], *arguments)
        assert code == 2
        assert message in output


def test_a_run_is_complete_once_it_has_ended_with_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("step_000004", "step_000012", ".step_000016.partial"):
        (tmp_path / "checkpoints" / folder).mkdir(parents=True)
    code, output = said(capsys, "inspect", tmp_path)
    assert code == 2
    assert "kind        a run's output_dir\ncheckpoints 4, 12\n" in output
    assert "an unfinished save is left: .step_000016.partial" in output
    assert "wrong       the run has not ended: no summary.json\n" in output
    assert "wrong       nothing was exported\n" in output
    (tmp_path / "summary.json").write_text('{"steps": 12}')
    (tmp_path / "export").mkdir()
    assert said(capsys, "inspect", tmp_path)[0] == 0
    (tmp_path / "summary.json").write_text("{")
    code, output = said(capsys, "inspect", tmp_path)
    assert code == 2
    assert "summary.json can't be read" in output
    assert said(capsys, "verify", tmp_path)[0] == 2


def test_the_folder_of_an_unfinished_conversion_is_not_complete(
    sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / ".made.partial"
    shutil.copytree(sound["untied-converted"], partial)
    code, output = said(capsys, "inspect", partial)
    assert code == 2
    assert "it is the unfinished folder of a save or a conversion" in output


def test_megatrons_tracker_file_leads_to_the_newest_checkpoint(
    sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sound["untied-converted"] / "weights", tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    arguments = ("verify", tmp_path, "--reference", sound["untied"], "--against", sound["untied"])
    code, output = said(capsys, *arguments)
    assert code == 0, output
    assert "equal in all of 25 tensors" in output
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    code, output = said(capsys, *arguments)
    assert code == 2
    assert "iter_0000008 is no torch_dist checkpoint" in output


def test_layers_that_are_stored_one_by_one_are_compared_too(
    copy: Callable[[str], Path], sound: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("untied-converted")
    stored = {}
    for key, tensor in converted_folder.global_tensors(sound["untied"]).items():
        if key.startswith("decoder.layers."):
            for layer, part in enumerate(tensor):
                stored[key.replace("layers.", f"layers.{layer}.")] = part.clone()
        else:
            stored[key] = tensor
    converted_folder.write_weights(folder / "weights", stored)
    code, output = said(capsys, "verify", folder, "--against", sound["untied"])
    assert code == 0, output
    assert "each layer is stored by itself" in output
    del stored["decoder.layers.1.mlp.linear_fc2.weight"]
    converted_folder.write_weights(folder / "weights", stored)
    code, output = said(capsys, "inspect", folder)
    assert code == 2
    assert "mlp.linear_fc2.weight" in output


def test_a_common_state_of_other_objects_is_left_alone(
    copy: Callable[[str], Path], sound: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As Megatron-LM keeps its arguments; megatron.core allows some types once it is imported."""
    folder = copy("untied-converted")
    file = folder / "weights" / "common.pt"
    torch.save({"iteration": 7, "args": fractions.Fraction(1, 2)}, file)
    code, output = said(capsys, "verify", folder, "--against", sound["untied"])
    assert code == 0, output
    assert "its common state holds more than plain values, and is not read" in output


@pytest.mark.parametrize("ids", ["", "1,", "a", "-1", "1 2"])
def test_token_ids_are_numbers_with_commas(
    ids: str, sound: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["verify", str(sound["untied"]), "--logits", f"--token-ids={ids}"])
    assert f"{ids!r} is no list of ids such as 1,2,3" in capsys.readouterr().err
