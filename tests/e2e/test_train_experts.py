"""A Qwen3-MoE student by the command: trained on two expert ranks, resumed on one, exported."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import qwen3_folder
from support.cli_run import REPO, metrics, rewound, settings, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLE = REPO / "examples" / "chain_sum" / "student"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random Qwen3-MoE with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "experts"
    shutil.copytree(EXAMPLE, folder)
    qwen3_folder.write(folder, vocab_size=24, tie_word_embeddings=True, **qwen3_folder.MOE)
    return folder


def arguments(student: Path, target: Path, *, expert: int) -> list[str]:
    return settings(
        target,
        f"--student.path={student}",
        f"--student.parallel.expert_model_parallel_size={expert}",
        *("--rollout.max_new_tokens=8", "--eval.max_new_tokens=8"),
    )


def test_experts_are_trained_resumed_on_other_ranks_and_exported(student, tmp_path):
    ended = train(arguments(student, tmp_path / "ep2", expert=2), world_size=2).expect(0)
    assert "4 experts, fp32, TP 1 x PP 1, EP 2" in ended.stdout
    first = load_file(student / "model.safetensors")
    exported = load_file(tmp_path / "ep2" / "export" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        name: tensor.shape for name, tensor in first.items()
    }
    assert all(not torch.equal(exported[name], first[name]) for name in first)

    resumed = rewound(tmp_path / "ep2", 4, tmp_path / "one")
    ended = train(arguments(student, resumed, expert=1)).expect(0)
    assert "going on after step 4" in ended.stdout
    there, here = metrics(tmp_path / "ep2"), metrics(resumed)
    assert len(here) == len(there) == 9
    for expected, found in zip(there[5:], here[5:], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    for name, tensor in load_file(resumed / "export" / "model.safetensors").items():
        torch.testing.assert_close(tensor, exported[name], rtol=0, atol=1e-5)
