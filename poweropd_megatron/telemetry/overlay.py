"""Figures of several runs over one another: the mean of runs that differ in seed, in their range.

A figure draws groups; the colour and the dashes of a group are those of its place in the list.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from poweropd_megatron.telemetry.axes import (
    MAX_MARKED,
    Records,
    Values,
    draw_legend,
    make_log,
    series,
    step_axes,
    step_groups,
)
from poweropd_megatron.telemetry.svg import MUTED, SERIES, SMALL, page_colour, render

MAX_POINTS = 40
"""Of a curve; fewer than of one that is drawn alone."""

_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)))


class Group(NamedTuple):
    """Runs that are drawn as one curve."""

    label: str
    runs: Sequence[Records]
    """The records of each run's metrics.jsonl."""


def curves(
    name: str,
    groups: Sequence[Group],
    key: str,
    unit: str,
    *,
    scale: float = 1.0,
    is_log: bool = False,
    bottom: float | None = None,
    reference: float | None = None,
    with_legend: bool = True,
    size: tuple[float, float] = SMALL,
) -> str | None:
    """Return the <svg> of a metric over steps, or None where no run recorded it.

    A line is the mean over a group's runs of what each recorded at a step, and its band the range
    over them, or for a single run one standard error (the metric `<key>_se`) to either side. Both
    are means of groups of steps where there are many. Steps that one of the runs doesn't have are
    left out. Where is_log, values that aren't positive are left out, and a mean is the geometric
    one. `reference` is a dashed level, times scale as the values are.
    """
    drawn = [
        (number, group.label, points)
        for number, group in enumerate(groups)
        if (points := mean_and_range(group.runs, key, scale, is_log=is_log)) is not None
    ]
    if not drawn:
        return None

    def plot(figure: Any) -> None:
        axes = step_axes(figure, unit)
        if is_log:
            shown = np.concatenate([values for _, _, points in drawn for values in points[1:]])
            make_log(axes, shown)
        if reference is not None:
            axes.axhline(scale * reference, color=MUTED, linestyle="--", linewidth=0.8)
        for number, label, (steps, mean, low, high) in drawn:
            colour, dashes = line_style(number)
            if (low < high).any():
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            marker = "o" if len(steps) <= MAX_MARKED // 2 else None
            axes.plot(steps, mean, color=colour, linestyle=dashes, marker=marker, label=label)
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        if with_legend:
            draw_legend(axes)

    return render(name, plot, size)


def line_style(number: int) -> tuple[str, Any]:
    """Return the colour and matplotlib's dashes of the number-th group, the first being 0."""
    return SERIES[number % len(SERIES)], _DASHES[(number // len(SERIES)) % len(_DASHES)]


def legend(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Return (svg of a line, label) for each group, for a page that says once what is what."""
    return [(_sample_line(number), label) for number, label in enumerate(labels)]


def _sample_line(number: int) -> str:
    colour, dashes = line_style(number)
    lengths = "none" if dashes == "-" else " ".join(str(2 * length) for length in dashes[1])
    line = f'<path d="M0 5H36" stroke="{page_colour(colour)}" stroke-width="2.5"'
    return f'<svg viewBox="0 0 36 10">{line} stroke-dasharray="{lengths}"/></svg>'


def mean_and_range(
    runs: Sequence[Records], key: str, scale: float, *, is_log: bool
) -> tuple[Values, Values, Values, Values] | None:
    """Return steps, mean, low and high; None where no step was recorded by every run."""
    found = [series(records, key) for records in runs]
    found = [(steps, scale * values) for steps, values in found if len(steps)]
    if is_log:
        found = [(steps[values > 0], values[values > 0]) for steps, values in found]
    if not found:
        return None
    common = reduce(np.intersect1d, [steps for steps, _ in found])
    if not len(common):
        return None
    values_RS = np.stack([values[np.searchsorted(steps, common)] for steps, values in found])
    if is_log:
        values_RS = np.log(values_RS)
    groups = step_groups(len(common), MAX_POINTS)
    thinned_RG = np.stack([values_RS[:, group].mean(axis=1) for group in groups], axis=1)
    if len(runs) == 1 and not is_log:
        errors = dict(zip(*series(runs[0], f"{key}_se"), strict=True))
        error_S = scale * np.array([errors.get(step, 0.0) for step in common])
        error_G = np.array([error_S[group].mean() for group in groups])
        thinned_RG = np.stack([thinned_RG[0] + sign * error_G for sign in (-1, 0, 1)])
    lines = (thinned_RG.mean(axis=0), thinned_RG.min(axis=0), thinned_RG.max(axis=0))
    mean, low, high = (np.exp(line) for line in lines) if is_log else lines
    return np.array([common[group].mean() for group in groups]), mean, low, high
