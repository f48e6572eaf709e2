"""Figures of the rewards in the diagnostics: over positions, probabilities and magnitudes."""

from typing import Any

import numpy as np
from matplotlib.colors import CenteredNorm, ListedColormap, LogNorm, to_rgba
from matplotlib.ticker import MaxNLocator

from poweropd_megatron.telemetry.axes import Records, draw_legend, first_and_last
from poweropd_megatron.telemetry.svg import GRID, MUTED, SERIES, SURFACE, WIDE, render


def reward_by_position(diagnostics: Records) -> str | None:
    """Draw reward over the position in the response, for the first and the last record."""
    records = [r for r in diagnostics if (r.get("reward_by_position") or {}).get("count")]
    shown = first_and_last(records)
    if not shown:
        return None

    def plot(figure: Any) -> None:
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, record in zip(panels, shown, strict=True):
            bins = record["reward_by_position"]
            edges = np.array(bins["edges"], dtype=float)
            centre = (edges[:-1] + edges[1:] - 1) / 2
            low, mean, high = (np.array(bins[key], dtype=float) for key in ("min", "mean", "max"))
            style = {"color": SERIES[0], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(centre, low, high, label="min to max", **style)
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.plot(centre, mean, color=SERIES[0], marker=".", label="mean")
            axes.set(title=f"step {record['step']}", xlabel="token of the response")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("reward")
        draw_legend(panels[-1])

    return render("reward-by-position", plot, WIDE)


def reward_map(diagnostics: Records) -> str | None:
    """Draw mean reward and number of tokens over (p_T, p_S), for the last record."""
    records = [r for r in diagnostics if np.any((r.get("reward_map") or {}).get("count", 0))]
    if not records:
        return None
    grid = records[-1]["reward_map"]
    edges = np.array(grid["edges"])
    values = np.array(grid["mean"], dtype=float)
    mean = np.ma.masked_invalid(values)
    count = np.ma.masked_equal(np.array(grid["count"]), 0)
    scale = float(np.nanpercentile(np.abs(values), 98)) if mean.count() else 0.0

    def plot(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        tiles = {"edgecolors": SURFACE, "linewidth": 0.5}
        left.pcolormesh(edges, edges, 0 * mean, cmap=ListedColormap([GRID]), **tiles)
        norm = CenteredNorm(halfrange=scale or 1.0)
        cells = left.pcolormesh(edges, edges, mean, cmap=_diverging(), norm=norm, **tiles)
        bar = figure.colorbar(cells, ax=left, extend="both", label="mean reward")
        bar.ax.set_facecolor(GRID)
        log = LogNorm(1, max(10, count.max()))
        cells = right.pcolormesh(edges, edges, count, cmap=_sequential(), norm=log, **tiles)
        figure.colorbar(cells, ax=right, label="tokens", format="{x:g}")
        for axes in (left, right):
            axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=0.8)
            axes.grid(visible=False)
            axes.set(aspect="equal", xlim=(0, 1), ylim=(0, 1))
            axes.set(xlabel="student's probability", ylabel="teacher's probability")

    return render("reward-map", plot, WIDE)


def _diverging() -> Any:
    """Return bad to good through transparent, in few enough levels for a colour bar of shapes."""
    levels = np.linspace(-1, 1, 33)
    return ListedColormap([to_rgba(SERIES[0 if x > 0 else 1], abs(x)) for x in levels])


def _sequential() -> Any:
    return ListedColormap([to_rgba(SERIES[3], alpha) for alpha in np.linspace(0.12, 1, 32)])
