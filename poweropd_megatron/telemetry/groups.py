"""Runs side by side: which differ in the seed alone, how the others differ, how all ended."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from poweropd_megatron.config.rules import CHANGEABLE_ON_RESUME
from poweropd_megatron.telemetry.overlay import Group
from poweropd_megatron.telemetry.records import RunRecords
from poweropd_megatron.telemetry.text import evaluation_measures, objective_label

_SAME_TRAINING = {*CHANGEABLE_ON_RESUME, "seed"} - {"train_steps"}
"""Patterns of settings in which runs of one group may differ."""


@dataclass(frozen=True, kw_only=True)
class RunGroup:
    """Runs whose settings are equal but for the seed and what leaves the training as it is."""

    label: str
    runs: Sequence[RunRecords]

    @property
    def curve(self) -> Group:
        """Return what the figures draw of it."""
        return Group(self.label, [run.metrics for run in self.runs])

    def shown(self, setting: str) -> str:
        """Return the values of a setting in these runs; "-" where one has none."""
        values = dict.fromkeys(_shown(run.settings.get(setting)) for run in self.runs)
        return ", ".join(values)


class Estimate(NamedTuple):
    """A mean, and its standard error where there is one."""

    mean: float
    error: float | None


def grouped(runs: Sequence[RunRecords]) -> list[RunGroup]:
    """Return the runs in groups, in the order of their first runs, labelled by what differs.

    A run without config.toml is a group of its own, under its folder's name.
    """
    names = [name for name in differing_settings(runs) if not _leaves_training(name)]
    members: dict[Any, list[RunRecords]] = {}
    for number, run in enumerate(runs):
        key = tuple(_shown(run.settings.get(name)) for name in names) if run.config else number
        members.setdefault(key, []).append(run)
    labels = [_label(group[0], names) for group in members.values()]
    return [
        RunGroup(
            label=label if labels.count(label) == 1 else f"{label} ({group[0].folder.name})",
            runs=group,
        )
        for label, group in zip(labels, members.values(), strict=True)
    ]


def differing_settings(runs: Sequence[RunRecords]) -> list[str]:
    """Return the settings, but output_dir, that are not the same in all runs that have any."""
    tables = [run.settings for run in runs if run.config]
    names = dict.fromkeys(name for table in tables for name in table if name != "output_dir")
    return [name for name in names if len({_shown(table.get(name)) for table in tables}) > 1]


def final_measures(group: RunGroup) -> dict[str, Estimate]:
    """Return each measure of the last evaluation, over all files: see estimate."""
    return _measures(group.runs, -1)


def first_measures(runs: Sequence[RunRecords]) -> dict[str, Estimate]:
    """Return each measure's mean over the runs' first evaluations, over all files.

    Without standard errors: the runs begin with one student and the same prompts.
    """
    return {name: Estimate(found.mean, None) for name, found in _measures(runs, 0).items()}


def estimate(values: Iterable[float | None], error: float | None = None) -> Estimate | None:
    """Return the mean over runs and its standard error; of a single run the error that is given.

    The standard error of n runs is their standard deviation (n - 1) over sqrt(n). None where one
    of the runs has no value.
    """
    found = list(values)
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return None
    if len(known) == 1:
        return Estimate(known[0], error)
    return Estimate(statistics.fmean(known), statistics.stdev(known) / math.sqrt(len(known)))


def _measures(runs: Sequence[RunRecords], which: int) -> dict[str, Estimate]:
    tables = [
        evaluation_measures(run.evaluations[which]).get("", {}) if run.evaluations else {}
        for run in runs
    ]
    names = [name for name in tables[0] if not name.endswith("_se")]
    estimates = {
        name: estimate([table.get(name) for table in tables], tables[0].get(f"{name}_se"))
        for name in names
    }
    return {name: found for name, found in estimates.items() if found is not None}


def _label(run: RunRecords, names: Sequence[str]) -> str:
    if not run.config:
        return run.folder.name
    of_objective = [name for name in names if name.startswith("objective.")]
    words = [objective_label(run.objective)] if of_objective or not names else []
    for name in names:
        leaf = name.rpartition(".")[2]
        if name not in of_objective or leaf == "terminal":
            words.append(f"{leaf} {_shown(run.settings.get(name))}")
    return ", ".join(words)


def _leaves_training(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _SAME_TRAINING)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
