"""An evaluation from its settings to its results: read, check, generate what is left, report."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from poweropd_megatron.config.evaluation_schema import EvaluationConfig
from poweropd_megatron.environment import world_size
from poweropd_megatron.evaluation.answering import generate, series_of
from poweropd_megatron.evaluation.inputs import EvaluationInputs, read_evaluation_inputs
from poweropd_megatron.evaluation.keeper import Keeper
from poweropd_megatron.evaluation.progress import Progress
from poweropd_megatron.output_dir import claimed
from poweropd_megatron.parallel import world


def run_evaluation(config: EvaluationConfig) -> None:
    """Evaluate, or go on with the evaluation in output_dir. Called by every rank of the job.

    Raises: UserError, on every rank, for anything that the user can mend; Interrupted.
    """
    world.hush_libraries()
    inputs = read_evaluation_inputs(config, world_size=world_size() or 1)
    with (
        world.joined(timeout_minutes=config.distributed_timeout_minutes) as device,
        claimed(Path(config.output_dir)),
    ):
        _evaluate(config, inputs, device)


def _evaluate(config: EvaluationConfig, inputs: EvaluationInputs, device: torch.device) -> None:
    all_series = series_of(config.eval, inputs.prompts)
    keeper = Keeper(config, inputs, all_series)
    world.on_first_rank(keeper.open)
    done = world.told_by_first_rank(keeper.num_done(), device=device).tolist()
    total = sum(series.num_responses for series in all_series)
    speaks = dist.get_rank() == 0
    with Progress(total=total, done=sum(done), speaks=speaks) as progress:
        progress.say([_introduction(config, inputs, total=total, done=sum(done))])
        if sum(done) < total:
            try:
                world.on_first_rank(keeper.start_checker)
                _answer_rest(config, inputs, keeper, progress, done, device)
            finally:
                keeper.stop_checker()
    if speaks:
        progress.say(keeper.finish())


def _answer_rest(
    config: EvaluationConfig,
    inputs: EvaluationInputs,
    keeper: Keeper,
    progress: Progress,
    done: Sequence[int],
    device: torch.device,
) -> None:
    """Answer what is left, in parts that rank 0 checks and keeps one after the other."""
    from poweropd_megatron.evaluation.engine import build_engine

    engine, num_at_once = build_engine(config, inputs, device)
    size = config.save_interval or 4 * num_at_once
    for number, series in enumerate(keeper.all_series):
        name = f"{series.source}, {'greedy' if series.is_greedy else 'sampled'}"
        for start in range(done[number], series.num_responses, size):
            stop = min(start + size, series.num_responses)
            trajectories = generate(engine, series, start, stop, weight_version=0)
            if dist.get_rank() == 0:
                answers = keeper.keep(number, start, trajectories)
                progress.advance(name, answers)


def _introduction(
    config: EvaluationConfig, inputs: EvaluationInputs, *, total: int, done: int
) -> str:
    parallel = config.student.parallel
    num_ranks, num_files = dist.get_world_size(), len(inputs.prompts)
    prompts = sum(map(len, inputs.prompts.values()))
    return (
        f"{config.student.path}, {config.student.dtype}, "
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} "
        f"on {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}: {total} responses to "
        f"{prompts} prompts of {num_files} {'file' if num_files == 1 else 'files'}"
        + (f", going on after {done}" if done else "")
    )
