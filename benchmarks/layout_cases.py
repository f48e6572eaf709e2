"""Steps of the bundled recipe in a layout, and rollouts of its student; run on the ranks.

Both return dataclasses as dictionaries.
"""

import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layout_models import write_expert_student
from layout_ranks import waiting_timed

RECIPE = Path(__file__).resolve().parents[1] / "launch" / "recipes" / "chain_sum.toml"
STUDENT = RECIPE.parents[2] / "examples" / "chain_sum" / "student"
PHASES = ("rollout", "teacher", "student", "step")
ROWS = 64
"""Responses decoded together where rollouts are compared."""
BATCH, MICRO_BATCH = 64, 16
EXPERT_STUDENT = "experts"
"""The student.path that stands for the student with experts, which is written on the spot."""
Settings = dict[str, object]
"""The recipe's settings that a layout changes, by their full names."""
TOKENS_PER_PACK = 1024
"""About as many as a micro-batch has."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The fastest step of a layout."""

    seconds: dict[str, float]
    """By phase, and of the whole step."""
    communication_seconds: float
    """Of the whole step, the mean over ranks."""
    padding_fractions: dict[str, float]
    """Of the student's micro-batches, right-padded and packed; of all steps."""


@dataclass(frozen=True, kw_only=True)
class Rolled:
    """What rollouts took."""

    num_forwards: int
    """Of this rank's model; of prompts as of tokens."""
    num_rows: int
    """Of all forwards of a token a row."""
    num_responses: int
    num_tokens: int
    seconds: float
    """Of the fastest round."""

    @property
    def rows_per_token(self) -> float:
        """Return the rows that were decoded for each token, 1 if none was idle.

        But for the first tokens of the responses, which come with their prompts.
        """
        return self.num_rows / (self.num_tokens - self.num_responses)

    @property
    def seconds_per_token(self) -> float:
        """Return the seconds for a response token."""
        return self.seconds / self.num_tokens


def time_steps(settings: Settings, num_steps: int) -> dict[str, Any]:
    """Return Steps, after one that doesn't count."""
    from poweropd_megatron.objectives.labels import label
    from poweropd_megatron.train.clock import Clock

    with tempfile.TemporaryDirectory() as folder:
        run = _build(settings, folder)
    measured: list[tuple[list[float], float]] = []
    lengths: list[list[int]] = []
    for step in range(num_steps + 1):
        prompts = [prompt.token_ids for prompt in run.prompts.next_batch(BATCH)]
        dist.barrier()
        clock = Clock()
        with waiting_timed() as waited:
            with clock.phase("rollout"):
                trajectories = run.rollout.generate(
                    prompts, run.sampling, stream=(0, step), weight_version=step
                )
            with clock.phase("teacher"):
                labels = label(trajectories, "raw", teacher_eos_id=run.teacher_eos_id)
                teacher_logp_BT = run.teacher.score(trajectories, labels)
            with clock.phase("student"):
                run.student.update(trajectories, labels, teacher_logp_BT, run.reward)
        seconds = clock.read()
        waited_mean = torch.tensor(waited.seconds / dist.get_world_size())
        dist.all_reduce(waited_mean)
        measured.append(([seconds[f"time/{name}_seconds"] for name in PHASES], float(waited_mean)))
        lengths.append(trajectories.total_lengths_B.tolist())
    seconds_of_phases, communication = min(measured[1:], key=lambda one: one[0][-1])
    forms = {
        "padded": run.student.batching,
        "packed": replace(run.student.batching, max_tokens_per_microbatch=TOKENS_PER_PACK),
    }
    steps = Steps(
        seconds=dict(zip(PHASES, seconds_of_phases, strict=True)),
        communication_seconds=communication,
        padding_fractions={name: form.padding_fraction(lengths) for name, form in forms.items()},
    )
    return asdict(steps)


def time_rollouts(how: str, settings: Settings, num_prompts: int, rounds: int) -> dict[str, Any]:
    """Return Rolled, of the student at a temperature at which some of its responses get long."""
    from poweropd_megatron.rollout.row_group import RowPolicy
    from poweropd_megatron.rollout.sampling import Sampling

    with tempfile.TemporaryDirectory() as folder:
        run = _build(settings | {"rollout.micro_batch_size": ROWS}, folder)
    prompts = [prompt.token_ids for prompt in run.prompts.next_batch(num_prompts)]
    sampling = Sampling(max_new_tokens=192, temperature=1.6)
    parts = [prompts]
    if how == "lock-step":
        run.rollout.row_policy = RowPolicy(refill_at=1.0, shrink_at=0.0)
    elif how == "shrinking":
        parts = [prompts[start : start + ROWS] for start in range(0, num_prompts, ROWS)]
    elif how == "PP2, one group":
        run.rollout.num_groups = 1
    rows_of_forwards: list[int] = []

    def count(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        rows, positions = kwargs["input_ids"].shape
        rows_of_forwards.append(rows if positions == 1 else 0)

    run.student.chunks[0].register_forward_pre_hook(count, with_kwargs=True)
    run.rollout.generate(prompts[:8], sampling, stream=(1,), weight_version=0)
    fastest = math.inf
    for _ in range(rounds):
        rows_of_forwards.clear()
        num_tokens = 0
        dist.barrier()
        begin = time.perf_counter()
        for number, part in enumerate(parts):
            rolled_out = run.rollout.generate(
                part, sampling, stream=(0,), weight_version=0, first_sequence=number * ROWS
            )
            num_tokens += int(rolled_out.response_lengths_B.sum())
        fastest = min(fastest, time.perf_counter() - begin)
    rolled = Rolled(
        num_forwards=len(rows_of_forwards),
        num_rows=sum(rows_of_forwards),
        num_responses=num_prompts,
        num_tokens=num_tokens,
        seconds=fastest,
    )
    return asdict(rolled)


def _build(settings: Settings, folder: str) -> Any:
    """Return the recipe's run, the teacher cut as the student is unless the settings differ."""
    from poweropd_megatron.config.load import parse_train_config
    from poweropd_megatron.train.build import build_run
    from poweropd_megatron.train.inputs import read_inputs

    os.chdir(RECIPE.parents[2])
    whole: Settings = {"output_dir": folder}
    for name in ("tensor", "pipeline"):
        size = f"parallel.{name}_model_parallel_size"
        of_student = settings.get(f"student.{size}", 1)
        whole |= {f"student.{size}": of_student, f"teacher.{size}": of_student}
    whole |= {"micro_batch_size": MICRO_BATCH, "teacher.micro_batch_size": MICRO_BATCH, **settings}
    if whole.get("student.path") == EXPERT_STUDENT:
        whole["student.path"] = Path(folder, "student")
        write_expert_student(STUDENT, whole["student.path"])
    argv = ["--config", str(RECIPE)]
    for name, value in whole.items():
        argv += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    config = parse_train_config(argv)
    inputs = read_inputs(config, world_size=dist.get_world_size())
    inputs.answer_checker.close()
    return build_run(config, inputs, torch.device("cpu"))
