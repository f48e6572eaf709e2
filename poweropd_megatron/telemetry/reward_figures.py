"""Figures of the rewards in the diagnostics: over positions, probabilities and magnitudes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import CenteredNorm, ListedColormap, LogNorm, to_rgba
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from poweropd_megatron.telemetry.axes import Records, Values, draw_legend, first_and_last
from poweropd_megatron.telemetry.overlay import line_style
from poweropd_megatron.telemetry.svg import GRID, MUTED, SERIES, SURFACE, WIDE, render

MAX_COLUMNS = 3
"""Panels beside one another."""


def reward_by_position(diagnostics: Records) -> str | None:
    """Draw reward over the position in the response, for the first and the last record."""
    records = [r for r in diagnostics if _has_positions(r)]
    shown = [(f"step {record['step']}", record) for record in first_and_last(records)]
    return _positions("reward-by-position", shown, WIDE, share_y=True) if shown else None


def rewards_by_position(named: Sequence[tuple[str, Records]]) -> str | None:
    """Draw reward over the position in the response for several runs' last records, by name."""
    records = [(name, [r for r in found if _has_positions(r)]) for name, found in named]
    shown = [(name, found[-1]) for name, found in records if found]
    height = 0.4 + 1.9 * math.ceil(len(shown) / MAX_COLUMNS)
    return _positions("rewards-by-position", shown, (WIDE[0], height)) if shown else None


def reward_map(diagnostics: Records) -> str | None:
    """Draw the reward's surface, and mean reward and number of tokens, over (p_T, p_S).

    Of the last record; a record of an older release has no surface.
    """
    records = [r for r in diagnostics if np.any((r.get("reward_map") or {}).get("count", 0))]
    if not records:
        return None
    grid, surface = records[-1]["reward_map"], records[-1].get("reward_surface")
    edges = np.array(grid["edges"])
    mean = np.array(grid["mean"], dtype=float)
    shown = [mean] if surface is None else [np.array(surface, dtype=float), mean]
    titles = ["mean reward of the tokens"] if surface is None else ["the reward", "of the tokens"]
    known = np.concatenate([np.abs(values[~np.isnan(values)]) for values in shown])
    scale = float(np.percentile(known, 98)) if known.size else 0.0
    count = np.ma.masked_equal(np.array(grid["count"]), 0)

    def plot(figure: Any) -> None:
        panels = figure.subplots(1, len(shown) + 1)
        tiles = {"edgecolors": SURFACE, "linewidth": 0.4}
        style = {"cmap": _diverging(), "norm": CenteredNorm(halfrange=scale or 1.0)}
        for axes, values, title in zip(panels, shown, titles, strict=False):
            found = np.ma.masked_invalid(values)
            axes.pcolormesh(edges, edges, 0 * found, cmap=ListedColormap([GRID]), **tiles)
            cells = axes.pcolormesh(edges, edges, found, **style, **tiles)
            axes.set_title(title)
        bar = figure.colorbar(cells, ax=panels[:-1], extend="both", label="reward", shrink=0.85)
        bar.ax.set_facecolor(GRID)
        log = LogNorm(1, max(10, count.max()))
        cells = panels[-1].pcolormesh(edges, edges, count, cmap=_sequential(), norm=log, **tiles)
        panels[-1].set_title("how many")
        figure.colorbar(cells, ax=panels[-1], label="tokens", format="{x:g}", shrink=0.85)
        for axes in panels:
            axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=0.8)
            axes.grid(visible=False)
            axes.set(aspect="equal", xlim=(0, 1), ylim=(0, 1), xlabel="student's probability")
        panels[0].set_ylabel("teacher's probability")

    return render("reward-map", plot, WIDE)


def reward_histogram(diagnostics: Records) -> str | None:
    """Draw the shares of rewards by sign and magnitude, of the first and the last record."""
    records = first_and_last([r for r in diagnostics if _histogram(r)[1].any()])
    styles = ((SERIES[4], "-"), (SERIES[0], "-"))
    lines = [
        (f"step {record['step']}", record, *style)
        for record, style in zip(records, styles, strict=False)
    ]
    return _histograms("reward-histogram", lines) if lines else None


def reward_histograms(named: Sequence[tuple[str, Records]]) -> str | None:
    """Draw the shares of rewards by sign and magnitude in several runs' last records."""
    lines = [
        (name, records[-1], *line_style(number))
        for number, (name, records) in enumerate(named)
        if records and _histogram(records[-1])[1].any()
    ]
    return _histograms("reward-histograms", lines, with_legend=False) if lines else None


def _has_positions(record: Mapping[str, Any]) -> bool:
    return bool((record.get("reward_by_position") or {}).get("count"))


def _positions(
    name: str,
    shown: Sequence[tuple[str, Mapping[str, Any]]],
    size: tuple[float, float],
    *,
    share_y: bool = False,
) -> str:
    """Return a panel for each titled record: the mean reward, and the range, by position."""

    def plot(figure: Any) -> None:
        columns = min(MAX_COLUMNS, len(shown))
        rows = math.ceil(len(shown) / columns)
        panels = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
        for axes, (title, record) in zip(panels.flat, shown, strict=False):
            bins = record["reward_by_position"]
            edges = np.array(bins["edges"], dtype=float)
            centre = (edges[:-1] + edges[1:] - 1) / 2
            low, mean, high = (np.array(bins[key], dtype=float) for key in ("min", "mean", "max"))
            style = {"color": SERIES[0], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(centre, low, high, label="min to max", **style)
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.plot(centre, mean, color=SERIES[0], marker=".", label="mean")
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for axes in panels.flat[len(shown) :]:
            axes.axis("off")
        for axes in panels[:, 0]:
            axes.set_ylabel("reward")
        for axes in panels[-1]:
            axes.set_xlabel("token of the response")
        draw_legend(panels[0, 0])

    return render(name, plot, size)


def _histograms(
    name: str,
    lines: Sequence[tuple[str, Mapping[str, Any], str, Any]],
    *,
    with_legend: bool = True,
) -> str:
    """Return histograms of labelled records, each in a colour and dashes."""

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        for label, record, colour, dashes in lines:
            edges, count = _histogram(record)
            style = {"color": colour, "linestyle": dashes, "linewidth": 1.3, "baseline": None}
            axes.stairs(100 * count / count.sum(), edges, label=label, **style)
        axes.set_xscale("symlog", linthresh=edges[len(edges) // 2], linscale=0.5)
        axes.set_xticks([-100, -1, -0.01, 0, 0.01, 1, 100])
        axes.set_yscale("log")
        axes.set(xlabel="reward", ylabel="% of tokens", xlim=(edges[0], edges[-1]))
        axes.xaxis.set(major_formatter="{x:g}", minor_locator=NullLocator())
        axes.yaxis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())
        if with_legend:
            draw_legend(axes)

    return render(name, plot)


def _histogram(record: Mapping[str, Any]) -> tuple[Values, Values]:
    """Return signed edges and counts of a record; empty where it has none."""
    found = record.get("reward_histogram")
    if not found:
        return np.zeros(1), np.zeros(0)
    edges = np.array(found["edges"])
    count = [*reversed(found["negative"]), found["zero"], *found["positive"]]
    return np.concatenate([-edges[::-1], edges]), np.array(count, dtype=float)


def _diverging() -> Any:
    """Return bad to good through transparent, in few enough levels for a colour bar of shapes."""
    levels = np.linspace(-1, 1, 33)
    return ListedColormap([to_rgba(SERIES[0 if x > 0 else 1], abs(x)) for x in levels])


def _sequential() -> Any:
    return ListedColormap([to_rgba(SERIES[3], alpha) for alpha in np.linspace(0.12, 1, 32)])
