"""What a checkpoint must hold: with all of it a resumed run is bitwise the same; without any piece
it isn't.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import build, differences, state_of, train_and_save

from poweropd_megatron.train.loop import Run


def start(folder: str, *changes: str) -> None:
    """Train four steps; save after two and at the end."""
    run = build(Path(folder), "--checkpoint.interval=2", *changes, steps=4)
    train_and_save(run, first_step=1)
    torch.save(state_of(run), Path(folder) / "straight.pt")


def resume(straight: str, folder: str, lost: str, *changes: str) -> None:
    """Go on after step 2, losing a piece of the state; write what differs at the end."""
    run = build(Path(folder), *changes, steps=4)
    shutil.copytree(Path(straight) / "checkpoints" / "step_000002", run.checkpoints.path(2))
    assert run.state.load_latest() == 2
    LOSSES[lost](run)
    train_and_save(run, first_step=3)
    differing = differences(torch.load(Path(straight) / "straight.pt"), state_of(run))
    (Path(folder) / "differing").write_text("\n".join(differing))


def optimizer_state(run: Run) -> list[dict[str, torch.Tensor]]:
    [part] = run.student.optimizer.chained_optimizers
    states = list(part.optimizer.state.values())
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in states)
    return states


def lose_moments(name: str) -> Callable[[Run], None]:
    def lose(run: Run) -> None:
        for state in optimizer_state(run):
            state[name].zero_()

    return lose


def lose_main_weights(run: Run) -> None:
    """Leave of the fp32 weights what their bf16 copies say."""
    [part] = run.student.optimizer.chained_optimizers
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            assert parameter.dtype == torch.float32
            parameter.data.copy_(parameter.bfloat16())


def lose_schedule(run: Run) -> None:
    run.student.schedule.num_steps = 0
    run.student.schedule.step(increment=0)


def lose_prompts(run: Run) -> None:
    run.prompts.load_state_dict(run.prompts.state_dict() | {"index": 0})


def lose_random_state(run: Run) -> None:  # noqa: ARG001
    torch.rand(1)


LOSSES: dict[str, Callable[[Run], None]] = {
    "nothing": lambda _run: None,
    "Adam's step count": lose_moments("step"),
    "Adam's first moment": lose_moments("exp_avg"),
    "Adam's second moment": lose_moments("exp_avg_sq"),
    "fp32 main weights": lose_main_weights,
    "learning-rate schedule": lose_schedule,
    "prompt cursor": lose_prompts,
    "random state": lose_random_state,
}


RUNS = {
    "fp32": ("--student.dtype=fp32",),
    "bf16": ("--student.dtype=bf16",),
    "mini-batches": (
        *("--student.dtype=fp32", "--mini_batch_size=4", "--objective.kind=z_score"),
        *("--objective.importance_ratio=sequence", "--rollout.temperature=0.8"),
    ),
}
"""Settings; the last has two optimizer steps a batch, and three passes of the student before."""


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, call_on_ranks: Callable[..., list[int | None]]
) -> dict[str, Path]:
    """Return the folders of an uninterrupted run of each kind."""
    folders = {}
    for name, changes in RUNS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        assert call_on_ranks(start, str(folders[name]), *changes) == [0]
    return folders


@pytest.fixture
def differing_after(
    straight: dict[str, Path], tmp_path: Path, call_on_ranks: Callable[..., list[int | None]]
) -> Callable[..., list[str]]:
    """Return a function that resumes without a piece, and returns what differs at the end."""

    def resume_without(lost: str, *, run: str) -> list[str]:
        arguments = (str(straight[run]), str(tmp_path), lost, *RUNS[run])
        assert call_on_ranks(resume, *arguments) == [0]
        return (tmp_path / "differing").read_text().splitlines()

    return resume_without


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_bitwise_the_run_that_was_not_interrupted(run, differing_after):
    assert differing_after("nothing", run=run) == []


@pytest.mark.parametrize(
    ("lost", "run"),
    [
        ("Adam's step count", "fp32"),
        ("Adam's first moment", "fp32"),
        ("Adam's second moment", "fp32"),
        ("fp32 main weights", "bf16"),
        ("learning-rate schedule", "fp32"),
        ("prompt cursor", "fp32"),
        ("learning-rate schedule", "mini-batches"),
    ],
)
def test_without_any_piece_of_the_state_the_resumed_weights_differ(lost, run, differing_after):
    assert any(name.startswith("main weight") for name in differing_after(lost, run=run))


def test_the_random_state_is_that_of_the_run_that_was_not_interrupted(differing_after):
    assert differing_after("random state", run="fp32") == ["random"]
