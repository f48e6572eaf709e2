"""A run from its settings to its export: read, check, build or resume, train, export, report."""

import os
from pathlib import Path
from typing import Any

import torch

from poweropd_megatron.checkpoint.store import CheckpointStore
from poweropd_megatron.config.load import to_toml
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.environment import world_size
from poweropd_megatron.output_dir import claimed
from poweropd_megatron.parallel import world
from poweropd_megatron.telemetry.console import Console
from poweropd_megatron.telemetry.sinks import replace_text
from poweropd_megatron.train.inputs import RunInputs, read_inputs
from poweropd_megatron.train.output_folder import (
    CONFIG_NAME,
    EXPORT_NAME,
    check_same_run,
    finished_summary,
)


def run_training(config: TrainConfig) -> None:
    """Train, or go on with the run in output_dir. Called by every rank of a torchrun job.

    What can be checked without a model is checked before Megatron is imported.
    Raises: UserError, on every rank, for anything that the user can mend; Interrupted.
    """
    world.hush_libraries()
    inputs = read_inputs(config, world_size=world_size() or 1)
    check_same_run(config)
    summary = finished_summary(config)
    if summary is not None:
        _tell_again(config, summary)
        inputs.answer_checker.close()
        return
    try:
        with (
            world.joined(timeout_minutes=config.distributed_timeout_minutes) as device,
            claimed(Path(config.output_dir)),
        ):
            _train(config, inputs, device)
    finally:
        inputs.answer_checker.close()


def _tell_again(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Say on rank 0 what a finished run came to, and write nothing."""
    if os.environ.get("RANK", "0") == "0":
        with Console(Path(os.devnull), total_steps=config.train_steps, log_interval=1) as console:
            console.info(f"{config.output_dir} holds a finished run; {_how_to_go_on(config)}")
            console.finish(summary, Path(config.output_dir))


def _how_to_go_on(config: TrainConfig) -> str:
    """Return what would go on with a finished run, or start anew."""
    anew = "another output_dir would start anew"
    if not CheckpointStore(Path(config.output_dir) / "checkpoints").steps():
        return f"its checkpoints are gone; {anew}"
    decay = ""
    if config.optimizer.lr_decay_style != "constant" and config.optimizer.lr_decay_iters is None:
        decay = f" with --optimizer.lr_decay_iters {config.train_steps}"
    return f"a larger train_steps{decay} would go on with it, {anew}"


def _train(config: TrainConfig, inputs: RunInputs, device: torch.device) -> None:
    from poweropd_megatron.checkpoint.export import export
    from poweropd_megatron.models.attention_settings import describe_attention
    from poweropd_megatron.ops.backends import describe
    from poweropd_megatron.train import loop
    from poweropd_megatron.train.build import build_run

    run = build_run(config, inputs, device)
    with run.recorder.speaking():
        run.recorder.introduce(inputs)
        are_expected, kernels = describe(device)
        (run.recorder.info if are_expected else run.recorder.warning)(kernels)
        run.recorder.info(describe_attention(config))
        last_step = run.state.load_latest()
        if run.recorder.is_first_rank:
            replace_text(Path(config.output_dir) / CONFIG_NAME, to_toml(config))
        run.recorder.start(last_step)
        if last_step == 0:
            run.recorder.step(0, {}, diagnostics=None, evaluation=loop.evaluate(run, 0))
        elif last_step == config.train_steps:
            evaluation = loop.evaluate(run, last_step)
            if evaluation is not None:
                run.recorder.add_evaluation(last_step, evaluation)
        loop.train(run, first_step=last_step + 1)
        folder = export(
            run.student,
            inputs.student,
            reference=config.student.path,
            target=Path(config.output_dir) / EXPORT_NAME,
        )
        run.teacher.check_unchanged()
        run.recorder.finish(folder)
