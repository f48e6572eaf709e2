"""A run of a few tiny steps inside one of the test's own ranks, and everything that its state is.

The functions are called on forked ranks: each builds process groups, which end with the rank.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.cli_run import settings

from poweropd_megatron.config.load import parse_train_config
from poweropd_megatron.environment import world_size
from poweropd_megatron.parallel import world
from poweropd_megatron.train import loop
from poweropd_megatron.train.build import build_run
from poweropd_megatron.train.inputs import read_inputs
from poweropd_megatron.train.loop import Run


def build(folder: Path, *changes: str, steps: int, tp: int = 1) -> Run:
    """Return a run whose next call of loop.train ends after `steps`; its responses are short."""
    config = parse_train_config(
        settings(
            folder,
            *("--rollout.max_new_tokens=6", "--data.eval_files=[]", "--eval.interval=0"),
            *("--optimizer.lr_decay_iters=6", "--optimizer.lr_warmup_iters=0", *changes),
            steps=steps,
            tp=tp,
        )
    )
    inputs = read_inputs(config, world_size=world_size() or 1)
    return build_run(config, inputs, world.start(timeout_minutes=3))


def train_and_save(run: Run, *, first_step: int) -> None:
    """Go on to the run's last step, where loop.train saves."""
    folder = Path(run.config.output_dir)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    loop.train(run, first_step=first_step)


def state_of(run: Run) -> dict[str, Any]:
    """Return copies of this rank's weights, optimizer state, schedule, prompt cursor and random
    state.
    """
    [part] = run.student.optimizer.chained_optimizers
    state: dict[str, Any] = {
        f"weight {name}": tensor for name, tensor in run.student.chunks[0].named_parameters()
    }
    parameters = [tensor for group in part.optimizer.param_groups for tensor in group["params"]]
    for number, parameter in enumerate(parameters):
        state[f"main weight {number}"] = parameter
        for name, value in part.optimizer.state[parameter].items():
            state[f"{name} {number}"] = value
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    return state | {
        "learning rate": [group["lr"] for group in part.param_groups],
        "schedule": run.student.schedule.state_dict(),
        "prompts": run.prompts.state_dict(),
        "random": torch.get_rng_state(),
    }


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the names of the parts of two states that are not bitwise the same."""
    assert a.keys() == b.keys()
    return [
        name
        for name, value in a.items()
        if not (
            torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        )
    ]
