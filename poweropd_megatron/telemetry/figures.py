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
    step_groups,
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
    keys = {
        "kl/student_teacher": "KL(student, teacher)",
        "entropy": "entropy of the student",
        "kl/full_vocabulary": "KL over the whole vocabulary",
    }
    return _curves("kl-and-entropy", metrics, keys, "nats per token")


def endings(metrics: Records) -> str | None:
    """Draw how responses end, and how far the sampling is from the student's distribution."""
    keys = {
        "rollout/eos_rate": "ended with EOS",
        "rollout/truncation_rate": "truncated",
        "rollout/truncated_mass": "mass that top-p and top-k cut off",
    }
    return _curves("endings", metrics, keys, "fraction", bottom=0.0)


def dead_rewards(metrics: Records) -> str | None:
    """Draw the share of tokens that have no reward although the models disagree."""
    keys = {"reward/dead_fraction": "dead rewards"}
    return _curves("dead-rewards", metrics, keys, "fraction of tokens", bottom=0.0)


def extreme_rewards(metrics: Records) -> str | None:
    """Draw the largest and the smallest reward of each step, and the mean at final EOS tokens."""
    keys = {
        "reward/max": "largest",
        "reward/min": "smallest",
        "reward/terminal_mean": "mean at the final EOS",
    }
    return _curves("extreme-rewards", metrics, keys, "reward")


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
    """Draw the gradient norm before clipping, raw and by the reward's scale, on a log axis.

    With the norm that it is clipped to.
    """
    return _log_curves(
        "gradient-norm",
        metrics,
        {"grad_norm": "gradient norm", "grad_norm_per_reward": "divided by the rewards' rms"},
        "L2 norm",
        reference=("clip_grad", clip_grad),
    )


def gradient_variance(metrics: Records) -> str | None:
    """Draw the estimated variance of the gradient beside its squared norm, on a log axis."""
    if not len(series(metrics, "grad_variance")[0]):
        return None
    squared = [
        {**record, "squared": record["grad_norm"] ** 2}
        for record in metrics
        if record.get("grad_norm") is not None
    ]
    keys = {"grad_variance": "variance", "squared": "squared norm"}
    return _log_curves("gradient-variance", squared, keys, "squared L2 norm")


def time_per_phase(metrics: Records) -> str | None:
    """Draw the seconds of each phase, stacked."""
    timed = [r for r in metrics if any(r.get(f"time/{phase}_seconds") for phase in PHASES)]
    if not timed:
        return None
    groups = step_groups(len(timed), MAX_BARS)
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


def _log_curves(
    name: str,
    metrics: Records,
    keys: Mapping[str, str],
    unit: str,
    reference: tuple[str, float | None] = ("", None),
) -> str | None:
    """Return curves of what is positive in several metrics, and a level, by its label."""
    found = {label: series(metrics, key) for key, label in keys.items()}
    positive = {
        label: (steps[values > 0], values[values > 0])
        for label, (steps, values) in found.items()
        if (values > 0).any()
    }
    if not positive:
        return None
    label, level = reference

    def plot(figure: Any) -> None:
        axes = step_axes(figure, unit)
        shown = [values for _, values in positive.values()]
        make_log(axes, np.concatenate([*shown, [level]] if level else shown))
        for (curve, points), colour in zip(positive.items(), SERIES, strict=False):
            draw_curve(axes, *points, colour, curve)
        if level:
            axes.axhline(level, color=MUTED, linestyle="--", linewidth=1, label=label)
        draw_legend(axes)

    return render(name, plot)
