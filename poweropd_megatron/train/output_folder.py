"""What may be in output_dir before a run, and whose it is: nothing but a run's own is replaced."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from poweropd_megatron.checkpoint.store import CheckpointStore
from poweropd_megatron.config.load import read_toml
from poweropd_megatron.config.rules import frozen_differences
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.output_dir import check_output_dir

CONFIG_NAME, EXPORT_NAME = "config.toml", "export"
RECORDS = ("metrics.jsonl", "diagnostics.jsonl", "samples.jsonl", "summary.json", "report.html")


def check_place(config: TrainConfig) -> None:
    """Return if output_dir is a folder or can be made, and no model is read from its export.

    Raises: ConfigError.
    """
    path = Path(config.output_dir)
    check_output_dir(path)
    export = path / EXPORT_NAME
    for name, model in (("student", config.student.path), ("teacher", config.teacher.path)):
        if Path(model).resolve().is_relative_to(export.resolve()):
            raise ConfigError(
                f"{name}.path: {model} lies where this run's export will be written, {export}: "
                "choose another output_dir, or move the model"
            )


def check_same_run(config: TrainConfig) -> None:
    """Return if a run with these settings may write to output_dir: start there, or go on.

    What an unfinished run without a checkpoint left there binds nobody; it is replaced.
    Raises: ConfigError for files that can't be told to be a run's, settings that differ and may
    not, train_steps that are done already, or results without a checkpoint to go on from.
    """
    folder = Path(config.output_dir)
    path = folder / CONFIG_NAME
    steps = _checkpoints(config)
    if not path.exists():
        _refuse_unknown(folder, has_checkpoints=bool(steps))
        return
    before = _read_settings(path)
    is_run = steps or any((folder / name).exists() for name in RECORDS)
    if (folder / EXPORT_NAME).exists() and not is_run:
        raise ConfigError(
            f"output_dir: {folder / EXPORT_NAME} is not a run's: {folder} has neither checkpoints "
            "nor records. Choose another output_dir, or move that folder"
        )
    has_results = bool(_results(folder))
    if not steps and not has_results:
        return
    if steps and steps[-1] > config.train_steps:
        raise ConfigError(
            f"train_steps = {config.train_steps}, but {config.output_dir} has a checkpoint of step "
            f"{steps[-1]}: set train_steps to at least that, or choose another output_dir"
        )
    _refuse_differences(config, before, has_checkpoints=bool(steps))
    if not steps and finished_summary(config) is None:
        raise ConfigError(
            f"{folder} holds the results of a run ({', '.join(_results(folder))}), but no "
            "checkpoint to go on from. Choose another output_dir, or remove it to train anew"
        )


def finished_summary(config: TrainConfig) -> dict[str, Any] | None:
    """Return summary.json if output_dir holds a run that has reached train_steps and its export.

    Its checkpoints may have been deleted since.
    """
    folder = Path(config.output_dir)
    newest = _checkpoints(config)[-1:]
    if newest not in ([], [config.train_steps]) or not (folder / EXPORT_NAME).is_dir():
        return None
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
        return summary if summary["steps"] == config.train_steps else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _checkpoints(config: TrainConfig) -> list[int]:
    return CheckpointStore(Path(config.output_dir) / "checkpoints").steps()


def _results(folder: Path) -> list[str]:
    return [name for name in ("summary.json", EXPORT_NAME) if (folder / name).exists()]


def _refuse_unknown(folder: Path, *, has_checkpoints: bool) -> None:
    found = ["checkpoints"] if has_checkpoints else []
    found += [name for name in (EXPORT_NAME, *RECORDS) if (folder / name).exists()]
    if found:
        raise ConfigError(
            f"output_dir: {folder} has {', '.join(found)}, but no {CONFIG_NAME} that tells of "
            f"which run. Choose another output_dir, restore {folder / CONFIG_NAME}, or move what "
            "is there"
        )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except ConfigError as error:
        raise ConfigError(
            f"output_dir: {path} is not the settings of a run ({error}). Choose another "
            "output_dir, or move that file"
        ) from None


def _refuse_differences(
    config: TrainConfig, before: dict[str, Any], *, has_checkpoints: bool
) -> None:
    differences = frozen_differences(before, dataclasses.asdict(config))
    if not differences:
        return
    advice = _decay_advice(config, before) if has_checkpoints else ""
    what = "a run" if has_checkpoints else "the results of a run"
    remedy = "set them back to go on with that run" if has_checkpoints else "remove it"
    raise ConfigError(
        f"{config.output_dir} holds {what} with other settings: {'; '.join(differences)}. "
        f"{advice}Choose another output_dir, or {remedy}"
    )


def _decay_advice(config: TrainConfig, before: dict[str, Any]) -> str:
    """Return how to keep the end of a decay that no one has set but train_steps, if it moved."""
    optimizer, end = config.optimizer, "optimizer.lr_decay_iters"
    was = before.get(end) or before.get("train_steps")
    decays = "constant" not in (
        optimizer.lr_decay_style,
        before.get("optimizer.lr_decay_style", "constant"),
    )
    if decays and optimizer.lr_decay_iters is None and was != config.train_steps:
        return f"--{end} {was} keeps that run's schedule of the learning rate. "
    return ""
