"""The comparison's figures: every method's runs over each other, mean and range over the seeds."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from poweropd_megatron.comparison.results import MethodResult
from poweropd_megatron.telemetry import overlay
from poweropd_megatron.telemetry.overlay import Group
from poweropd_megatron.telemetry.page import Figure
from poweropd_megatron.telemetry.svg import GRID, MUTED, SERIES, WIDE, render

PANELS_IN_ROW = 3
SIZE = (4.8, 3.4)
"""Inches: SMALL of telemetry.svg, with room for a legend of nine methods."""
ACCURACY = "eval/greedy_accuracy"


def figures(methods: Sequence[MethodResult]) -> dict[str, Figure]:
    """Return the figures by the names of their files; without runs they hold nothing to draw."""
    groups = [Group(m.name, [run.records for run in m.finished]) for m in methods]
    curves = partial(overlay.curves, groups=groups, size=SIZE)
    seeds = "Line: mean over the seeds. Band: their range."
    return {
        "final_accuracy": Figure(
            "Final accuracy",
            "Greedy, after the last step. Dots: seeds. Bars: mean ± one standard error.",
            _final_accuracy(methods),
        ),
        "accuracy": Figure(
            "Accuracy",
            f"Greedy, in percent. {seeds}",
            curves("accuracy", key=ACCURACY, unit="%", scale=100),
        ),
        "accuracy_by_method": Figure(
            "Accuracy by method",
            f"Greedy. {seeds} The other methods' means are grey.",
            _panels(groups),
            wide=True,
        ),
        "gradient_norm": Figure(
            "Gradient norm",
            f"Before clipping. {seeds}",
            curves("gradient-norm", key="grad_norm", unit="", is_log=True),
        ),
        "reward_range": Figure(
            "Range of the reward",
            "Lowest and highest of a single token in all runs. The axis is linear within ±1 and "
            "logarithmic beyond.",
            _reward_range(methods),
        ),
        "kl": Figure(
            "Distance from the teacher",
            f"KL from the student's own tokens (k1). {seeds}",
            curves("kl", key="kl/student_teacher", unit="nats per token"),
        ),
        "entropy": Figure(
            "Entropy",
            f"Of the student at its own tokens. {seeds}",
            curves("entropy", key="entropy", unit="nats per token"),
        ),
        "response_length": Figure(
            "Response length",
            f"Mean of the rollouts, EOS included. {seeds}",
            curves("response-length", key="response_length/mean", unit="tokens"),
        ),
        "eos_rate": Figure(
            "Responses that end",
            f"Share of the rollouts with EOS, in percent. {seeds}",
            curves("eos-rate", key="rollout/eos_rate", unit="%", scale=100),
        ),
    }


def _panels(groups: Sequence[Group]) -> str | None:
    curves = {
        group.label: points
        for group in groups
        if (points := overlay.mean_and_range(group.runs, ACCURACY, 1.0, is_log=False)) is not None
    }
    if not curves:
        return None
    rows = math.ceil(len(curves) / PANELS_IN_ROW)

    def plot(figure: Any) -> None:
        panels = figure.subplots(rows, PANELS_IN_ROW, sharex=True, sharey=True, squeeze=False)
        for axes, (label, (steps, mean, low, high)) in zip(
            panels.flat, curves.items(), strict=False
        ):
            for other_steps, other_mean, *_ in curves.values():
                axes.plot(other_steps, other_mean, color=GRID, linewidth=1)
            axes.fill_between(steps, low, high, color=SERIES[0], alpha=0.2, linewidth=0)
            axes.plot(steps, mean, color=SERIES[0], marker="o", markersize=3)
            axes.set_title(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axes in panels.flat[len(curves) :]:
            axes.set_axis_off()
        figure.supxlabel("optimizer step", fontsize=9)

    return render("accuracy-by-method", plot, (WIDE[0], 1.8 * rows + 0.3))


def _final_accuracy(methods: Sequence[MethodResult]) -> str | None:
    spreads = [method.spread("accuracy_final") for method in methods]
    if not any(spread.values for spread in spreads):
        return None

    def plot(figure: Any) -> None:
        axes = _method_axes(figure, methods)
        for row, spread in enumerate(spreads):
            if spread.mean is None:
                continue
            own = 100 * np.array(spread.values)
            axes.plot(own, np.full(len(own), row), ".", color=MUTED)
            axes.errorbar(
                100 * spread.mean,
                row,
                xerr=100 * (spread.standard_error or 0.0),
                fmt="o",
                color=SERIES[0],
                capsize=3,
            )
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))

    return render("final-accuracy", plot, SIZE)


def _reward_range(methods: Sequence[MethodResult]) -> str | None:
    lows = [method.spread("reward_min").values for method in methods]
    highs = [method.spread("reward_max").values for method in methods]
    if not any(lows) or not any(highs):
        return None

    def plot(figure: Any) -> None:
        axes = _method_axes(figure, methods)
        axes.set_xscale("symlog", linthresh=1.0)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for row, (low, high) in enumerate(zip(lows, highs, strict=True)):
            if low and high:
                axes.plot([min(low), max(high)], [row, row], color=SERIES[0], linewidth=4)
        axes.xaxis.set_major_formatter("{x:g}")

    return render("reward-range", plot, SIZE)


def _method_axes(figure: Any, methods: Sequence[MethodResult]) -> Any:
    """Return axes with a row for each method, the first on top."""
    axes = figure.subplots()
    axes.set_yticks(range(len(methods)), [method.name for method in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="x")
    return axes
