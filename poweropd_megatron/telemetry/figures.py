"""The report's figures. Each returns SVG, or None where the run recorded nothing to draw."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import CenteredNorm, ListedColormap, LogNorm, to_rgba
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from poweropd_megatron.telemetry.svg import GRID, MUTED, SERIES, SURFACE, WIDE, render
from poweropd_megatron.telemetry.text import ordered_measures

Records = Sequence[Mapping[str, Any]]
Values = npt.NDArray[np.float64]

MAX_POINTS = 80
"""Longer curves are drawn as means, within the range, of this many groups of steps."""
MAX_BARS = 40
PHASES = ("rollout", "teacher", "student", "eval", "checkpoint")


def accuracy(metrics: Records) -> str | None:
    """Draw greedy accuracy, avg@k and pass@k, with their standard errors."""
    names = ordered_measures(
        {key[5:] for record in metrics for key in record if key[:5] == "eval/"}
    )
    names = [name for name in names if name == "greedy_accuracy" or "@" in name]
    if not names:
        return None

    def plot(figure: Any) -> None:
        axes = _step_axes(figure)
        for name, colour in zip(names, SERIES, strict=False):
            steps, values = _series(metrics, f"eval/{name}")
            errors = dict(zip(*_series(metrics, f"eval/{name}_se"), strict=True))
            bars = np.array([errors.get(step, 0.0) for step in steps])
            label = name.replace("_accuracy", "")
            style = {"marker": "o", "capsize": 2.5, "elinewidth": 1, "color": colour}
            axes.errorbar(steps, 100 * values, 100 * bars, label=label, **style)
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        _legend(axes)

    return render("accuracy", plot)


def response_length(metrics: Records) -> str | None:
    """Draw the mean length of rollouts and of evaluation responses."""
    keys = {"response_length/mean": "rollouts", "eval/response_length": "evaluation"}
    return _curves("response-length", metrics, keys, "tokens", bottom=0.0)


def kl_and_entropy(metrics: Records) -> str | None:
    """Draw the student's divergence from the teacher and its entropy."""
    keys = {"kl/student_teacher": "KL(student, teacher)", "entropy": "entropy of the student"}
    return _curves("kl-and-entropy", metrics, keys, "nats per token")


def fractions(metrics: Records) -> str | None:
    """Draw how responses end and how many tokens have no reward."""
    keys = {
        "rollout/eos_rate": "ended with EOS",
        "rollout/truncation_rate": "truncated",
        "reward/dead_fraction": "dead rewards",
    }
    return _curves("fractions", metrics, keys, "fraction", bottom=0.0)


def throughput(metrics: Records) -> str | None:
    """Draw tokens per second."""
    keys = {"tokens_per_second": "tokens per second"}
    return _curves("throughput", metrics, keys, "tokens per second", bottom=0.0)


def reward(metrics: Records) -> str | None:
    """Draw the mean reward in its band from p05 to p95."""
    steps, mean = _series(metrics, "reward/mean")
    if not len(steps):
        return None

    def plot(figure: Any) -> None:
        axes = _step_axes(figure, "reward")
        low_steps, low = _series(metrics, "reward/p05")
        high_steps, high = _series(metrics, "reward/p95")
        if len(low) == len(high) > 0:
            band = _thinned(low_steps, low)[:2] + _thinned(high_steps, high)[1:2]
            style = {"color": SERIES[0], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(*band, label="p05 to p95", **style)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.plot(*_thinned(steps, mean)[:2], color=SERIES[0], label="mean")
        _legend(axes)

    return render("reward", plot)


def gradient_norm(metrics: Records, clip_grad: float | None) -> str | None:
    """Draw the gradient norm before clipping, on a log axis, and the norm that it is clipped to."""
    steps, norm = _series(metrics, "grad_norm")
    steps, norm = steps[norm > 0], norm[norm > 0]
    if not len(steps):
        return None

    def plot(figure: Any) -> None:
        axes = _step_axes(figure)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())
        shown = np.append(norm, clip_grad or norm[:1])
        axes.set_ylim(shown.min() / 2, shown.max() * 2)
        _curve(axes, steps, norm, SERIES[0], "gradient norm")
        if clip_grad:
            axes.axhline(clip_grad, color=MUTED, linestyle="--", linewidth=1, label="clip_grad")
        _legend(axes)

    return render("gradient-norm", plot)


def time_per_phase(metrics: Records) -> str | None:
    """Draw the seconds of each phase, stacked."""
    timed = [r for r in metrics if any(r.get(f"time/{phase}_seconds") for phase in PHASES)]
    if not timed:
        return None
    groups = np.array_split(np.arange(len(timed)), min(MAX_BARS, len(timed)))
    steps = np.array([record["step"] for record in timed])
    edges = np.array([steps[group[0]] for group in groups] + [steps[-1] + 1]) - 0.5
    seconds = {
        phase: np.array([record.get(f"time/{phase}_seconds") or 0.0 for record in timed])
        for phase in PHASES
    }
    total = sum(values.sum() for values in seconds.values())

    def plot(figure: Any) -> None:
        axes = _step_axes(figure, "seconds per step")
        baseline = np.zeros(len(groups))
        for (phase, values), colour in zip(seconds.items(), SERIES, strict=True):
            if values.any():
                top = baseline + [values[group].mean() for group in groups]
                label = f"{phase} {100 * values.sum() / total:.0f} %"
                axes.stairs(top, edges, baseline=baseline, fill=True, color=colour, label=label)
                baseline = top
        _legend(axes)

    return render("time-per-phase", plot)


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
        _legend(panels[-1])

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


def first_and_last[Item](items: Sequence[Item]) -> list[Item]:
    """Return the ends of a sequence: two items, or one, or none."""
    return [*items[:1], *items[1:][-1:]]


def _curves(
    name: str, metrics: Records, keys: Mapping[str, str], unit: str, bottom: float | None = None
) -> str | None:
    if not any(len(_series(metrics, key)[0]) for key in keys):
        return None

    def plot(figure: Any) -> None:
        axes = _step_axes(figure, unit)
        for (key, label), colour in zip(keys.items(), SERIES, strict=False):
            _curve(axes, *_series(metrics, key), colour, label)
        axes.set_ylim(bottom=bottom)
        if len(keys) > 1:
            _legend(axes)

    return render(name, plot)


def _curve(axes: Any, steps: Values, values: Values, colour: str, label: str) -> None:
    if not len(steps):
        return
    centre, mean, low, high = _thinned(steps, values)
    if len(centre) < len(steps):
        axes.fill_between(centre, low, high, color=colour, alpha=0.2, linewidth=0)
    marker = "o" if len(centre) <= MAX_BARS else None
    axes.plot(centre, mean, color=colour, marker=marker, label=label)


def _series(records: Records, key: str) -> tuple[Values, Values]:
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _thinned(steps: Values, values: Values) -> tuple[Values, Values, Values, Values]:
    groups = np.array_split(np.arange(len(steps)), min(MAX_POINTS, len(steps)))
    centre = np.array([steps[group].mean() for group in groups])
    grouped = [values[group] for group in groups]
    mean, low, high = (
        np.array([reduce(group) for group in grouped]) for reduce in (np.mean, np.min, np.max)
    )
    return centre, mean, low, high


def _step_axes(figure: Any, unit: str = "") -> Any:
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def _legend(axes: Any) -> None:
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _diverging() -> Any:
    """Return bad to good through transparent, in few enough levels for a colour bar of shapes."""
    levels = np.linspace(-1, 1, 33)
    return ListedColormap([to_rgba(SERIES[0 if x > 0 else 1], abs(x)) for x in levels])


def _sequential() -> Any:
    return ListedColormap([to_rgba(SERIES[3], alpha) for alpha in np.linspace(0.12, 1, 32)])
