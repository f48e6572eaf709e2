"""A reference whose model isn't the one that the input itself states is refused."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from support import qwen3_folder
from support.converted_folder import global_tensors
from support.edited_folder import edit_json
from support.stored_checkpoint import write_in_pieces

from poweropd_megatron.conversion.to_hugging_face import to_hugging_face
from poweropd_megatron.conversion.to_megatron import to_megatron
from poweropd_megatron.errors import InputError
from poweropd_megatron.inspection.folder import examine
from poweropd_megatron.models.families import read_model_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a Hugging Face folder of a model with experts."""
    qwen3_folder.write(tmp_path / "hf", **qwen3_folder.MOE)
    return tmp_path / "hf"


def with_changes(folder: Path, **fields: object) -> Path:
    """Return a copy of a folder with other values in its config.json."""
    copy = Path(shutil.copytree(folder, folder.with_name("other")))
    edit_json(copy, "config.json", **fields)
    return copy


def write_checkpoint(target: Path, folder: Path, **run: object) -> None:
    """Write a model's tensors as a training run does that notes this."""
    common = {"common_state/shard_0_1": [{"run": run}]}
    write_in_pieces(target, global_tensors(folder), {}, common)


def assert_refused(source: Path, reference: Path, out: Path, *texts: str) -> None:
    with pytest.raises(InputError) as caught:
        to_hugging_face(source, out, reference=reference)
    message = str(caught.value)
    assert message.startswith(f"--reference: {reference / 'config.json'} describes another model")
    assert all(text in message for text in texts), message
    assert "\n" not in message
    assert not out.exists()


@pytest.mark.parametrize("place", [".", "weights"])
def test_a_converted_folder_is_held_to_its_config(place, folder, tmp_path):
    to_megatron(folder, tmp_path / "megatron")
    reference = with_changes(folder, rope_theta=1234.0, num_experts_per_tok=3)
    was = read_model_config(folder, setting="made")
    assert was.experts is not None
    assert_refused(
        tmp_path / "megatron" / place,
        reference,
        tmp_path / "out",
        f"than {tmp_path / 'megatron' / 'config.json'}: ",
        f"rotary_base is 1234.0, not {was.rotary_base}",
        f"experts.moe_router_topk is 3, not {was.experts.moe_router_topk}",
    )
    to_hugging_face(tmp_path / "megatron" / place, tmp_path / "out", reference=folder)


def test_a_training_checkpoint_is_held_to_the_model_that_its_run_recorded(folder, tmp_path):
    was = read_model_config(folder, setting="made")
    write_checkpoint(tmp_path / "step", folder, model=asdict(was))
    assert_refused(
        tmp_path / "step",
        with_changes(folder, rms_norm_eps=0.5),
        tmp_path / "out",
        f"than {tmp_path / 'step'}: layernorm_epsilon is 0.5, not {was.layernorm_epsilon}",
    )
    to_hugging_face(tmp_path / "step", tmp_path / "out", reference=folder)


def test_a_record_of_another_version_is_refused(folder, tmp_path):
    write_checkpoint(tmp_path / "step", folder, model={"num_layers": 2, "colour": "red"})
    with pytest.raises(InputError, match=r"--input: .*step: the run's model can't be read: .*col"):
        to_hugging_face(tmp_path / "step", tmp_path / "out", reference=folder)
    assert any(
        "the run's model can't be read" in text for text in examine(tmp_path / "step").problems
    )
