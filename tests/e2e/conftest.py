"""Runs that several tests look at, each made once; the folders are not to be changed."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cli_run import Ended, ForkedRun, launch, settings, steps_recorded, train


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run: the arguments that made it, its folder, and what it said at its last start."""

    folder: Path
    arguments: list[str]
    ended: Ended


def _killed_after_step_5(folder: Path, *, tp: int) -> Path:
    """Return the folder of a run of eight steps that saves the fourth and is killed after the
    fifth.
    """
    with ForkedRun(settings(folder, tp=tp), world_size=tp) as run:
        run.wait_until(lambda: 5 in steps_recorded(folder))
        run.kill()
    assert [entry.name for entry in folder.glob("checkpoints/step_*")] == ["step_000004"]
    return folder


def _resumed(folder: Path, target: Path, *, tp: int = 1, pp: int = 1) -> RunFolder:
    """Return a copy of a folder after the run in it went on, with an export of its own."""
    shutil.copytree(folder, target)
    arguments = settings(target, tp=tp, pp=pp)
    return RunFolder(
        folder=target, arguments=arguments, ended=train(arguments, world_size=tp * pp).expect(0)
    )


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the runs' folders lie in."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def tp2(runs: Path) -> RunFolder:
    """Return a run of eight steps on two tensor-parallel ranks, by the launch script."""
    arguments = settings(runs / "tp2", tp=2)
    ended = launch(arguments, world_size=2).expect(0)
    return RunFolder(folder=runs / "tp2", arguments=arguments, ended=ended)


@pytest.fixture(scope="session")
def killed_tp2(runs: Path) -> Path:
    """Return the folder of the same run, killed after its fifth step."""
    return _killed_after_step_5(runs / "killed_tp2", tp=2)


@pytest.fixture(scope="session")
def resumed_tp2(runs: Path, killed_tp2: Path) -> RunFolder:
    """Return the killed run after the launch script went on with it."""
    folder = runs / "resumed_tp2"
    shutil.copytree(killed_tp2, folder)
    arguments = settings(folder, tp=2)
    return RunFolder(
        folder=folder, arguments=arguments, ended=launch(arguments, world_size=2).expect(0)
    )


@pytest.fixture(scope="session")
def one(runs: Path) -> RunFolder:
    """Return a run of eight steps in one process."""
    arguments = settings(runs / "one")
    return RunFolder(folder=runs / "one", arguments=arguments, ended=train(arguments).expect(0))


@pytest.fixture(scope="session")
def killed_one(runs: Path) -> Path:
    """Return the folder of the same run, killed after its fifth step."""
    return _killed_after_step_5(runs / "killed_one", tp=1)


@pytest.fixture(scope="session")
def resumed_one(runs: Path, killed_one: Path) -> RunFolder:
    """Return the killed run after it went on."""
    return _resumed(killed_one, runs / "resumed_one")


@pytest.fixture(scope="session")
def vpp2(runs: Path) -> RunFolder:
    """Return the run on two stages of two chunks each."""
    virtual = "--student.parallel.virtual_pipeline_model_parallel_size=2"
    arguments = settings(runs / "vpp2", virtual, pp=2)
    ended = train(arguments, world_size=2).expect(0)
    return RunFolder(folder=runs / "vpp2", arguments=arguments, ended=ended)


@pytest.fixture(scope="session")
def bf16(runs: Path) -> RunFolder:
    """Return a run of two steps in one process, in bf16, of a student whose folder is in fp32."""
    arguments = settings(
        runs / "bf16",
        "--student.dtype=bf16",
        "--optimizer.lr_warmup_iters=0",
        "--optimizer.lr_decay_style=constant",
        steps=2,
    )
    return RunFolder(folder=runs / "bf16", arguments=arguments, ended=train(arguments).expect(0))
