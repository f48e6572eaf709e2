"""Objectives over the whole vocabulary by the command: resumed, and with a bf16 MoE student."""

import shutil
from pathlib import Path

import pytest
from support import qwen3_folder
from support.cli_run import REPO, metrics, rewound, settings, train
from support.run_comparison import assert_bitwise_the_same, assert_the_same_up_to_rounding

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLE = REPO / "examples" / "chain_sum" / "student"


def test_a_run_of_power_exact_goes_on_bitwise_and_with_another_teacher_layout_up_to_rounding(
    tmp_path: Path,
) -> None:
    def go_on(folder: Path, *changes: str, pp: int = 1) -> str:
        exact = ("--objective.kind=power_exact", "--objective.alpha=2", *changes)
        return train(settings(folder, *exact, pp=pp), world_size=2).expect(0).stdout

    straight = tmp_path / "straight"
    go_on(straight, pp=2)
    resumed, other = (rewound(straight, 4, tmp_path / name) for name in ("resumed", "other"))
    assert "going on after step 4" in go_on(resumed, pp=2)
    assert_bitwise_the_same(straight, resumed)
    go_on(other, "--teacher.parallel.context_parallel_size=2")
    assert_the_same_up_to_rounding(straight, other)


@pytest.mark.parametrize("kind", ["power_exact", "reverse_kl"])
def test_a_student_with_experts_in_bf16_nears_its_teacher(kind: str, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(EXAMPLE, student)
    qwen3_folder.write(student, vocab_size=24, tie_word_embeddings=True, **qwen3_folder.MOE)
    arguments = settings(
        tmp_path / "run",
        f"--objective.kind={kind}",
        f"--student.path={student}",
        *("--student.dtype=bf16", "--teacher.dtype=bf16", "--optimizer.lr=1e-2"),
        *("--student.parallel.expert_model_parallel_size=2", "--rollout.max_new_tokens=8"),
        "--eval.max_new_tokens=8",
        steps=12,
    )
    train(arguments, world_size=2).expect(0)
    divergence = [line["kl/full_vocabulary"] for line in metrics(tmp_path / "run")[1:]]
    assert len(divergence) == 12
    assert sum(divergence[-3:]) < 0.93 * sum(divergence[:3])
