"""What a run wrote, read back for reports."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poweropd_megatron.config.settings import SETTINGS
from poweropd_megatron.errors import InputError
from poweropd_megatron.telemetry.sinks import read_jsonl, read_metrics
from poweropd_megatron.telemetry.text import evaluation_measures


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """The records of a run; what it didn't write is empty."""

    folder: Path
    metrics: Sequence[dict[str, Any]]
    diagnostics: Sequence[dict[str, Any]]
    samples: Sequence[dict[str, Any]]
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    """config.toml: tables of settings."""
    config_text: str

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl with an evaluation."""
        return [record for record in self.metrics if evaluation_measures(record)]

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings by dotted name; without config.toml none.

        What a config.toml of an older release doesn't have, or leaves out, had its default.
        """
        if not self.config:
            return {}
        defaults = {name: s.default for name, s in SETTINGS.items() if not s.required}
        return {**defaults, **dict(_flat(self.config))}

    @property
    def objective(self) -> Mapping[str, Any]:
        """Return the settings under `objective`."""
        objective: Mapping[str, Any] = (
            self.summary.get("objective") or self.config.get("objective") or {}
        )
        return objective


def read_run(run_dir: Path) -> RunRecords:
    """Return the records of a run, finished or going on.

    Reads metrics.jsonl and, where they exist, diagnostics.jsonl, samples.jsonl, summary.json and
    config.toml.

    Raises: InputError if there is no such folder or no metrics.jsonl in it, or a file is malformed.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a folder; give the output_dir of a run")
    if not (run_dir / "metrics.jsonl").is_file():
        raise InputError(f"{run_dir} has no metrics.jsonl; give the output_dir of a run")
    metrics = read_metrics(run_dir / "metrics.jsonl")
    config_text = _read_text(run_dir / "config.toml")
    return RunRecords(
        folder=run_dir,
        metrics=metrics,
        diagnostics=_read_records(run_dir / "diagnostics.jsonl"),
        samples=_read_records(run_dir / "samples.jsonl"),
        summary=_parse(run_dir / "summary.json", _read_text(run_dir / "summary.json"), json.loads),
        config=_parse(run_dir / "config.toml", config_text, tomllib.loads),
        config_text=config_text,
    )


def _read_records(path: Path) -> Sequence[dict[str, Any]]:
    return read_jsonl(path) if path.exists() else []


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _parse(path: Path, text: str, parse: Any) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = parse(text) if text else {}
    except ValueError as error:
        raise InputError(f"{path} can't be read: {error}") from error
    return parsed


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
