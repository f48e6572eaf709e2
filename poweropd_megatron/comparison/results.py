"""What the runs of a comparison came to, read back from their folders."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from poweropd_megatron import __version__
from poweropd_megatron.comparison.plan import PlannedRun, check_equal_but_for
from poweropd_megatron.comparison.recipe import Recipe
from poweropd_megatron.comparison.statistics import Spread, run_statistics, spread
from poweropd_megatron.config.load import read_toml
from poweropd_megatron.telemetry.axes import Records
from poweropd_megatron.telemetry.sinks import read_metrics
from poweropd_megatron.train.output_folder import CONFIG_NAME

NOT_FINISHED = "not finished"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run after its end, or what it failed of."""

    seed: int
    error: str | None
    records: Records
    """Of metrics.jsonl; empty unless the run is finished."""
    statistics: dict[str, float | None]
    """Empty unless the run is finished."""


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """All runs of a method, in the order of the seeds."""

    name: str
    settings: dict[str, Any]
    """Those that it has for itself."""
    runs: list[RunResult]

    @property
    def finished(self) -> list[RunResult]:
        """Return the runs that its statistics are of."""
        return [run for run in self.runs if run.error is None]

    def spread(self, name: str) -> Spread:
        """Return a statistic over the seeds."""
        return spread([run.statistics for run in self.finished], name)


def collect(
    recipe: Recipe, runs: Sequence[PlannedRun], failures: Mapping[PlannedRun, str | None]
) -> list[MethodResult]:
    """Return the methods' results, in the recipe's order.

    The settings that the finished runs recorded are compared once more.
    Raises: ConfigError if they differ in more than they may.
    """
    finished = [run for run in runs if run.is_finished]
    if finished:
        check_equal_but_for(
            recipe.methods,
            [(run.name, run.method, read_toml(run.folder / CONFIG_NAME)) for run in finished],
        )
    results = {run: _result(run, recipe, failures) for run in runs}
    return [
        MethodResult(
            name=method,
            settings=settings,
            runs=[result for run, result in results.items() if run.method == method],
        )
        for method, settings in recipe.methods.items()
    ]


def to_json(recipe: Recipe, methods: Sequence[MethodResult]) -> dict[str, Any]:
    """Return everything but the records: settings, machine, statistics of runs and methods."""
    return {
        "machine": machine(),
        "seeds": recipe.seeds,
        "side_by_side": {"jobs": recipe.jobs, "ranks": recipe.ranks, "threads": recipe.threads},
        "settings": recipe.train,
        "methods": {
            method.name: {
                "settings": method.settings,
                "statistics": {
                    name: asdict(method.spread(name)) for name in _statistic_names(method)
                },
                "runs": [
                    {"seed": run.seed, "error": run.error, "statistics": run.statistics}
                    for run in method.runs
                ],
            }
            for method in methods
        },
    }


def machine() -> dict[str, Any]:
    """Return what the comparison is told on; the runs were made there unless folders were moved."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "poweropd_megatron": __version__,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _statistic_names(method: MethodResult) -> list[str]:
    return list(method.finished[0].statistics) if method.finished else []


def _result(
    run: PlannedRun, recipe: Recipe, failures: Mapping[PlannedRun, str | None]
) -> RunResult:
    if not run.is_finished:
        error = failures.get(run) or NOT_FINISHED
        return RunResult(seed=run.seed, error=error, records=[], statistics={})
    records = read_metrics(run.folder / "metrics.jsonl")
    return RunResult(
        seed=run.seed,
        error=None,
        records=records,
        statistics=run_statistics(records, recipe.thresholds),
    )
