"""Training runs by the command: through the launch script, or in ranks that fork with everything
imported.

A forked rank calls the same main() in the environment that torchrun would give it; it only saves
the seconds that importing Megatron takes.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import psutil

REPO = Path(__file__).resolve().parents[2]
LAUNCH_SCRIPT = "launch/pretrain_opd.sh"
SECONDS = 200.0
"""Longest time that a run may take."""
GRACE_SECONDS = 5.0
"""How long the other ranks may go on after the first failure, before they are ended as by torchrun.
"""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCH_VARIABLES = ("NNODES", "NODE_RANK", "GPUS_PER_NODE", "SLURM_")

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(
    ["poweropd_megatron.train.run", "poweropd_megatron.train.build", "poweropd_megatron.cli.main"]
)


def settings(
    output_dir: Path, *changes: str, steps: int = 8, tp: int = 1, pp: int = 1
) -> list[str]:
    """Return the arguments of a tiny run of the bundled task; later ones win."""
    layout = [
        f"--{model}.parallel.{kind}_model_parallel_size={size}"
        for model in ("student", "teacher")
        for kind, size in (("tensor", tp), ("pipeline", pp))
    ]
    return [
        *("--config", "launch/recipes/chain_sum.toml", f"--output_dir={output_dir}"),
        *(f"--train_steps={steps}", "--optimizer.lr_warmup_iters=2", "--optimizer.lr=1e-3"),
        *("--global_batch_size=8", "--micro_batch_size=2", "--teacher.micro_batch_size=4"),
        *("--checkpoint.interval=4", "--checkpoint.keep_last=9", "--distributed_timeout_minutes=3"),
        *("--eval.interval=4", "--eval.max_prompts=6", "--eval.num_samples=2"),
        *("--telemetry.diagnostics_interval=2", "--telemetry.num_logged_samples=4"),
        *layout,
        *changes,
    ]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that is over."""

    codes: list[int]
    """Exit code of each rank; of the launch script alone where that was run."""
    stdout: str
    """Of rank 0."""
    stderr: str
    """Of all ranks."""

    @property
    def code(self) -> int:
        """Return rank 0's exit code."""
        return self.codes[0]

    def expect(self, code: int) -> Self:
        """Return this; fail with all that was said unless every rank ended with `code`."""
        assert set(self.codes) == {code}, f"{self.codes}\n{self.stdout}\n{self.stderr}"
        return self


def launch(arguments: Sequence[str], *, world_size: int) -> Ended:
    """Return the run that the launch script made, from the root of the checkout."""
    return ended(start(arguments, world_size=world_size))


def start(arguments: Sequence[str], *, world_size: int) -> subprocess.Popen[str]:
    """Return the launch script, started in a process group of its own."""
    foreign = (*RANK_VARIABLES, *LAUNCH_VARIABLES)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment |= {
        "NPROC_PER_NODE": str(world_size),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "POWEROPD_PYTHON": sys.executable,
    }
    return subprocess.Popen(
        ["bash", LAUNCH_SCRIPT, *arguments],
        cwd=REPO,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def ended(script: subprocess.Popen[str]) -> Ended:
    """Return a started launch script's run after its end; its processes are ended if it hangs."""
    try:
        stdout, stderr = script.communicate(timeout=SECONDS)
    except BaseException:
        os.killpg(script.pid, signal.SIGKILL)
        raise
    return Ended(codes=[script.returncode], stdout=stdout, stderr=stderr)


def train(arguments: Sequence[str], *, world_size: int = 1, **environment: str) -> Ended:
    """Return a run of forked ranks after its end."""
    with ForkedRun(arguments, world_size=world_size, **environment) as run:
        return run.wait()


def evaluate(arguments: Sequence[str], *, world_size: int = 1, **environment: str) -> Ended:
    """Return an evaluation on forked ranks after its end."""
    with ForkedRun(arguments, world_size=world_size, command="eval", **environment) as run:
        return run.wait()


class ForkedRun:
    """A command, by default train, on ranks that run now; leaving the block ends them."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        world_size: int = 1,
        command: str = "train",
        **environment: str,
    ) -> None:
        """Start the ranks, with these variables in their environment."""
        self._logs = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._ranks = fork(
            _poweropd,
            [command, *arguments],
            world_size=world_size,
            logs=self._logs,
            **environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._logs)

    def kill(self) -> None:
        """End the ranks, and what they started, as kill -9 does."""
        ended = []
        for rank in self._ranks:
            if rank.is_alive():
                ended += psutil.Process(rank.pid).children(recursive=True)
                rank.kill()
        for process in ended:
            if process.is_running():
                process.kill()
        for rank in self._ranks:
            rank.join()

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return when `holds`, which must become so before the run ends."""
        deadline = time.monotonic() + SECONDS
        while not holds():
            over = any(rank.exitcode is not None for rank in self._ranks)
            assert not over, f"the run ended too early\n{self._ended()}"
            assert time.monotonic() < deadline, f"it never came\n{self._ended()}"
            time.sleep(0.005)

    def wait(self) -> Ended:
        """Return the run after its end."""
        join(self._ranks)
        return self._ended()

    def _ended(self) -> Ended:
        errors = [(self._logs / f"{rank}.err").read_text() for rank in range(len(self._ranks))]
        return Ended(
            codes=[-1 if rank.exitcode is None else rank.exitcode for rank in self._ranks],
            stdout=(self._logs / "0.out").read_text(),
            stderr="".join(errors),
        )


def fork(
    target: Callable[..., Any], *args: Any, world_size: int, logs: Path, **environment: str
) -> Sequence[BaseProcess]:
    """Return processes that call target(*args) as the ranks of a job, writing logs/RANK.{out,err}.

    The target must be importable by its name, the arguments picklable.
    """
    environment |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(_free_port()) if world_size > 1 else "0"
    ranks = []
    for rank in range(world_size):
        variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for suffix in ("out", "err"):
            (logs / f"{rank}.{suffix}").touch()
        process = _FORK.Process(target=_be_rank, args=(target, args, variables, str(logs)))
        process.start()
        ranks.append(process)
    return ranks


def join(ranks: Sequence[BaseProcess]) -> list[int | None]:
    """Return the exit codes; ranks that outlive another's failure or the time limit are killed."""
    deadline = time.monotonic() + SECONDS
    while any(rank.exitcode is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.01)
    for rank in ranks:
        if rank.exitcode is None:
            rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a .jsonl file; none if it isn't there, but for a torn last line."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def steps_recorded(folder: Path) -> list[int]:
    """Return the steps in a run's metrics.jsonl."""
    return [record["step"] for record in records(folder / "metrics.jsonl")]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without times and memory, which no two runs share."""
    return [
        {
            name: value
            for name, value in record.items()
            if not name.startswith(("time/", "memory/")) and name != "tokens_per_second"
        }
        for record in records(folder / "metrics.jsonl")
    ]


def rewound(folder: Path, step: int, target: Path) -> Path:
    """Return a copy of a run's folder as a kill after `step` might have left it: later checkpoints,
    the export and the summary aren't there; later records are.
    """
    shutil.copytree(folder, target)
    for checkpoint in (target / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    for name in ("summary.json", "report.html"):
        (target / name).unlink()
    shutil.rmtree(target / "export")
    config = target / "config.toml"
    config.write_text(config.read_text().replace(str(folder), str(target)))
    return target


def _be_rank(
    target: Callable[..., Any], args: tuple[Any, ...], variables: dict[str, str], logs: str
) -> None:
    import torch

    for descriptor, suffix in ((1, "out"), (2, "err")):
        log = os.open(f"{logs}/{variables['RANK']}.{suffix}", os.O_WRONLY | os.O_APPEND)
        os.dup2(log, descriptor)
        os.close(log)
    os.chdir(REPO)
    os.environ.update(variables)
    torch.set_num_threads(1)
    target(*args)


def _poweropd(arguments: list[str]) -> None:
    from poweropd_megatron.cli.main import main

    sys.exit(main(arguments))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
