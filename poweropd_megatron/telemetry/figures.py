"""The report's figures. Each returns SVG, or None where the run recorded nothing to draw."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from poweropd_megatron.telemetry.axes import (
    Records,
    draw_curve,
    draw_legend,
    make_log,
    series,
    step_axes,
    thinned,
)
from poweropd_megatron.telemetry.svg import MUTED, SERIES, render
from poweropd_megatron.telemetry.text import ordered_measures

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
        axes = step_axes(figure)
        for name, colour in zip(names, SERIES, strict=False):
            steps, values = series(metrics, f"eval/{name}")
            errors = dict(zip(*series(metrics, f"eval/{name}_se"), strict=True))
            bars = np.array([errors.get(step, 0.0) for step in steps])
            label = name.replace("_accuracy", "")
            style = {"marker": "o", "capsize": 2.5, "elinewidth": 1, "color": colour}
            axes.errorbar(steps, 100 * values, 100 * bars, label=label, **style)
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        draw_legend(axes)

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
    steps, mean = series(metrics, "reward/mean")
    if not len(steps):
        return None

    def plot(figure: Any) -> None:
        axes = step_axes(figure, "reward")
        low_steps, low = series(metrics, "reward/p05")
        high_steps, high = series(metrics, "reward/p95")
        if len(low) == len(high) > 0:
            band = thinned(low_steps, low)[:2] + thinned(high_steps, high)[1:2]
            style = {"color": SERIES[0], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(*band, label="p05 to p95", **style)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.plot(*thinned(steps, mean)[:2], color=SERIES[0], label="mean")
        draw_legend(axes)

    return render("reward", plot)


def gradient_norm(metrics: Records, clip_grad: float | None) -> str | None:
    """Draw the gradient norm before clipping, on a log axis, and the norm that it is clipped to."""
    steps, norm = series(metrics, "grad_norm")
    steps, norm = steps[norm > 0], norm[norm > 0]
    if not len(steps):
        return None

    def plot(figure: Any) -> None:
        axes = step_axes(figure)
        make_log(axes, np.append(norm, clip_grad or norm[:1]))
        draw_curve(axes, steps, norm, SERIES[0], "gradient norm")
        if clip_grad:
            axes.axhline(clip_grad, color=MUTED, linestyle="--", linewidth=1, label="clip_grad")
        draw_legend(axes)

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
        axes = step_axes(figure, "seconds per step")
        baseline = np.zeros(len(groups))
        for (phase, values), colour in zip(seconds.items(), SERIES, strict=False):
            if values.any():
                top = baseline + [values[group].mean() for group in groups]
                label = f"{phase} {100 * values.sum() / total:.0f} %"
                axes.stairs(top, edges, baseline=baseline, fill=True, color=colour, label=label)
                baseline = top
        draw_legend(axes)

    return render("time-per-phase", plot)


def _curves(
    name: str, metrics: Records, keys: Mapping[str, str], unit: str, bottom: float | None = None
) -> str | None:
    if not any(len(series(metrics, key)[0]) for key in keys):
        return None

    def plot(figure: Any) -> None:
        axes = step_axes(figure, unit)
        for (key, label), colour in zip(keys.items(), SERIES, strict=False):
            draw_curve(axes, *series(metrics, key), colour, label)
        axes.set_ylim(bottom=bottom)
        if len(keys) > 1:
            draw_legend(axes)

    return render(name, plot)
