"""A run from its settings to its export: read, check, build or resume, train, export, report."""

import dataclasses
import fcntl
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from poweropd_megatron.checkpoint.store import CheckpointStore
from poweropd_megatron.config.load import read_toml, to_toml
from poweropd_megatron.config.rules import frozen_differences
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.parallel import world
from poweropd_megatron.telemetry.console import Console
from poweropd_megatron.telemetry.sinks import replace_text
from poweropd_megatron.train.inputs import RunInputs, read_inputs


def run_training(config: TrainConfig) -> None:
    """Train, or go on with the run in output_dir. Called by every rank of a torchrun job.

    What can be checked without a model is checked before Megatron is imported.
    Raises: UserError, on every rank, for anything that the user can mend.
    """
    _hush_libraries()
    inputs = read_inputs(config, world_size=world.world_size_from_environment())
    check_same_run(config)
    summary = finished_summary(config)
    if summary is not None:
        _tell_again(config, summary)
        inputs.answer_checker.close()
        return
    device = world.start(timeout_minutes=config.distributed_timeout_minutes)
    try:
        with _claimed(config):
            _train(config, inputs, device)
    finally:
        inputs.answer_checker.close()
        dist.destroy_process_group()


def _hush_libraries() -> None:
    """Keep to themselves what Megatron and torch say at import of optional packages and old names.

    A rank prints some twenty such lines before its first step; errors still come through.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.")
    for name in ("megatron.core", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_same_run(config: TrainConfig) -> None:
    """Return if output_dir has no checkpoint to resume from, or that of a run with these settings.

    Raises: ConfigError that lists the settings that differ and may not, or train_steps that are
    done already.
    """
    path = Path(config.output_dir) / "config.toml"
    steps = _checkpoints(config)
    if not path.exists() or not steps:
        return
    if steps[-1] > config.train_steps:
        raise ConfigError(
            f"train_steps = {config.train_steps}, but {config.output_dir} has a checkpoint of step "
            f"{steps[-1]}: set train_steps to at least that, or choose another output_dir"
        )
    differences = frozen_differences(read_toml(path), dataclasses.asdict(config))
    if differences:
        raise ConfigError(
            f"{config.output_dir} holds a run with other settings: {'; '.join(differences)}. "
            "Choose another output_dir, or set them back to go on with that run"
        )


def finished_summary(config: TrainConfig) -> dict[str, Any] | None:
    """Return summary.json if output_dir holds a run that has reached train_steps and its export."""
    folder = Path(config.output_dir)
    if _checkpoints(config)[-1:] != [config.train_steps] or not (folder / "export").is_dir():
        return None
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
        return summary if summary["steps"] == config.train_steps else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _checkpoints(config: TrainConfig) -> list[int]:
    return CheckpointStore(Path(config.output_dir) / "checkpoints").steps()


def _tell_again(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Say on rank 0 what a finished run came to, and write nothing."""
    if os.environ.get("RANK", "0") == "0":
        with Console(Path(os.devnull), total_steps=config.train_steps, log_interval=1) as console:
            console.info(
                f"{config.output_dir} holds a finished run; a larger train_steps would go on with "
                "it, another output_dir would start anew"
            )
            console.finish(summary, Path(config.output_dir))


def _train(config: TrainConfig, inputs: RunInputs, device: torch.device) -> None:
    from poweropd_megatron.checkpoint.export import export
    from poweropd_megatron.ops.backends import describe
    from poweropd_megatron.train import loop
    from poweropd_megatron.train.build import build_run

    run = build_run(config, inputs, device)
    with run.recorder.speaking():
        run.recorder.introduce(inputs)
        are_expected, kernels = describe(device)
        (run.recorder.info if are_expected else run.recorder.warning)(kernels)
        last_step = run.state.load_latest()
        if run.recorder.is_first_rank:
            replace_text(Path(config.output_dir) / "config.toml", to_toml(config))
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
            target=Path(config.output_dir) / "export",
        )
        run.recorder.finish(folder)


@contextmanager
def _claimed(config: TrainConfig) -> Iterator[None]:
    """Hold output_dir for this run, on rank 0."""
    folder = Path(config.output_dir)
    with ExitStack() as held:

        def claim() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context((folder / ".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"output_dir: another run is writing to {folder}") from None
            except OSError as error:
                raise ConfigError(f"output_dir: {folder} can't be locked: {error}") from None

        world.agreed(claim if dist.get_rank() == 0 else lambda: None)
        yield
