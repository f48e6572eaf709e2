"""Models that compute or hold NaN: one message that names the model, before anything is trained."""

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.cli_run import REPO, settings, steps_recorded, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def with_one(value: float, name: str, target: Path) -> Path:
    """Return a copy of the bundled student or teacher with one such value among its weights."""
    shutil.copytree(REPO / "examples" / "chain_sum" / name, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("name", "tp", "evaluated", "what"),
    [
        ("student", 1, True, "log-probs of the rollout"),
        ("student", 2, False, "log-probs of the rollout"),
        ("teacher", 1, False, "log-probs of the teacher"),
        ("teacher", 2, True, "log-probs of the teacher"),
    ],
)
def test_an_infinity_in_a_models_weights_ends_the_run_with_the_models_name(
    name, tp, evaluated, what, tmp_path
):
    folder = with_one(math.inf, name, tmp_path / "model")
    changes = [f"--{name}.path={folder}"]
    changes += [] if evaluated else ["--data.eval_files=[]", "--eval.interval=0"]
    run = train(settings(tmp_path / "run", *changes, steps=3, tp=tp), world_size=tp).expect(2)
    assert "Traceback" not in run.stderr
    [message] = [line for line in run.stderr.splitlines() if "error" in line]
    assert message.startswith("poweropd: error: ")
    assert f"values of the {what} are not finite; " in message
    assert f"Check the weights in {name}.path" in message
    assert "optimizer.lr" not in message
    assert 1 not in steps_recorded(tmp_path / "run")


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_nan_among_a_models_weights_is_named_when_they_are_read(name, tmp_path):
    folder = with_one(math.nan, name, tmp_path / "model")
    run = train(settings(tmp_path / "run", f"--{name}.path={folder}", tp=2), world_size=2).expect(2)
    [message] = [line for line in run.stderr.splitlines() if "error" in line]
    tensor = "model.layers.1.mlp.down_proj.weight"
    assert message == f"poweropd: error: {name}.path: {tensor} has NaN in it (on rank 0)"
