"""What figures are made of: series of records, curves over steps, axes and legends."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

Records = Sequence[Mapping[str, Any]]
Values = npt.NDArray[np.float64]

MAX_POINTS = 80
"""Longer curves are drawn as means, within the range, of this many groups of steps."""
MAX_MARKED = 40
"""Curves of at most this many points have a marker at each."""


def first_and_last[Item](items: Sequence[Item]) -> list[Item]:
    """Return the ends of a sequence: two items, or one, or none."""
    return [*items[:1], *items[1:][-1:]]


def series(records: Records, key: str) -> tuple[Values, Values]:
    """Return the steps at which a metric was recorded, and its values."""
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def step_groups(num_points: int, most: int = MAX_POINTS) -> list[npt.NDArray[np.intp]]:
    """Return the points of a curve in at most so many groups, each drawn as one.

    All but the last have the same size, so that a curve is as smooth at its ends as elsewhere.
    """
    size = max(1, -(-num_points // most))
    return [np.arange(num_points)[start : start + size] for start in range(0, num_points, size)]


def thinned(steps: Values, values: Values) -> tuple[Values, Values, Values, Values]:
    """Return for each group of steps its centre, and the mean and the range of its values."""
    groups = step_groups(len(steps))
    centre = np.array([steps[group].mean() for group in groups])
    grouped = [values[group] for group in groups]
    mean, low, high = (
        np.array([reduce(group) for group in grouped]) for reduce in (np.mean, np.min, np.max)
    )
    return centre, mean, low, high


def draw_curve(axes: Any, steps: Values, values: Values, colour: str, label: str) -> None:
    """Draw a metric over steps; a long one as means of groups of steps in the groups' range."""
    if not len(steps):
        return
    centre, mean, low, high = thinned(steps, values)
    if len(centre) < len(steps):
        axes.fill_between(centre, low, high, color=colour, alpha=0.2, linewidth=0)
    marker = "o" if len(centre) <= MAX_MARKED else None
    axes.plot(centre, mean, color=colour, marker=marker, label=label)


def step_axes(figure: Any, unit: str = "") -> Any:
    """Return axes over the step."""
    axes = figure.subplots()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return axes


def make_log(axes: Any, shown: Values) -> None:
    """Make the y axis logarithmic, with plain numbers, around positive values."""
    axes.set_yscale("log")
    axes.set_ylim(shown.min() / 1.5, shown.max() * 1.5)
    decades = np.log10(shown.max() / shown.min())
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())


def draw_legend(axes: Any, *, columns: int = 3) -> None:
    """Put the legend above the axes."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns)
