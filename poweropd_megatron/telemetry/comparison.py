"""One self-contained HTML page about several runs: their curves over one another."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from poweropd_megatron.errors import ConfigError
from poweropd_megatron.telemetry import overlay, reward_figures
from poweropd_megatron.telemetry.groups import (
    Estimate,
    RunGroup,
    differing_settings,
    estimate,
    final_measures,
    first_measures,
    grouped,
)
from poweropd_megatron.telemetry.page import Figure, render_page
from poweropd_megatron.telemetry.records import RunRecords, read_run
from poweropd_megatron.telemetry.sinks import check_output, replace_text
from poweropd_megatron.telemetry.text import (
    MISSING,
    format_measure,
    format_number,
    measure_label,
    ordered_measures,
)


class _Curve(NamedTuple):
    """A figure: its title, caption, metric and unit, and how overlay.curves is to draw it."""

    title: str
    caption: str
    key: str
    unit: str
    options: dict[str, Any] = {}  # noqa: RUF012  Never written to.


_Table = tuple[list[str], list[tuple[str, list[str]]]]
"""Its head, and rows of a name and cells."""

_PERCENT = {"scale": 100.0}
_LOG = {"is_log": True}
_FROM_ZERO = {"bottom": 0.0}

_SECTIONS: dict[str, tuple[_Curve, ...]] = {
    "Gradients and rewards": (
        _Curve("Gradient norm", "Before clipping, on a log axis.", "grad_norm", "L2 norm", _LOG),
        _Curve(
            "Gradient norm by the reward's scale",
            "Divided by the root mean square of the rewards.",
            "grad_norm_per_reward",
            "L2 norm / reward",
            _LOG,
        ),
        _Curve(
            "Chance in the gradient",
            "Its estimated variance, by its squared norm.",
            "grad_variance_fraction",
            "fraction",
            _FROM_ZERO,
        ),
        _Curve("Largest reward", "Of a step's tokens.", "reward/max", "reward"),
        _Curve("Smallest reward", "Of a step's tokens.", "reward/min", "reward"),
        _Curve("Mean reward", "Above 0: the teacher favours the tokens.", "reward/mean", "reward"),
        _Curve(
            "Dead rewards",
            "Tokens without a reward although the models disagree.",
            "reward/dead_fraction",
            "% of tokens",
            _PERCENT | _FROM_ZERO,
        ),
    ),
    "Student and responses": (
        _Curve(
            "Distance from the teacher",
            "KL from the sampled tokens (k1).",
            "kl/student_teacher",
            "nats per token",
        ),
        _Curve("Entropy of the student", "At the tokens in the loss.", "entropy", "nats per token"),
        _Curve(
            "Response length", "Of rollouts, EOS included.", "response_length/mean", "tokens",
            _FROM_ZERO,
        ),
        _Curve(
            "Truncated responses",
            "That reached rollout.max_new_tokens.",
            "rollout/truncation_rate",
            "% of responses",
            _PERCENT | _FROM_ZERO,
        ),
    ),
    "Cost": (
        _Curve("Time", "Evaluations included.", "time/step_seconds", "s per step", _FROM_ZERO),
        _Curve(
            "Throughput",
            "Prompts and responses through rollout, teacher and student.",
            "tokens_per_second",
            "tokens per second",
            _FROM_ZERO,
        ),
    ),
}  # fmt: skip


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Return path, written from the records of several runs, finished or not.

    Runs that differ in their seed alone are one curve: their mean in their range.

    Raises: InputError, see read_run; ConfigError for a folder that is given twice, or a path that
    can't be written.
    """
    resolved = [run_dir.resolve() for run_dir in run_dirs]
    for number, run_dir in enumerate(run_dirs):
        if resolved[number] in resolved[:number]:
            raise ConfigError(f"{run_dir} is given twice; name each run once")
    check_output(path)
    runs = [read_run(run_dir) for run_dir in run_dirs]
    replace_text(path, comparison_page(runs))
    return path


def comparison_page(runs: Sequence[RunRecords]) -> str:
    """Return the page: numbers at the end, curves, settings that differ, and the runs."""
    groups = grouped(runs)
    return render_page(
        "comparison.html",
        groups=groups,
        legend=overlay.legend([group.label for group in groups]),
        outcome=_outcome(groups, runs),
        sections=_sections(groups),
        settings=_settings(groups, runs),
        runs=[
            (group.label, run.folder.name, _shown_seed(run), _last_step(run))
            for group in groups
            for run in group.runs
        ],
    )


def _settings(groups: Sequence[RunGroup], runs: Sequence[RunRecords]) -> _Table:
    """Return the settings that differ between groups, in the table's shorter direction across."""
    names = [name for name in differing_settings(runs) if name != "seed"]
    if len(names) <= len(groups):
        return names, [(group.label, [group.shown(name) for name in names]) for group in groups]
    labels = [group.label for group in groups]
    return labels, [(name, [group.shown(name) for group in groups]) for name in names]


def _outcome(groups: Sequence[RunGroup], runs: Sequence[RunRecords]) -> _Table:
    """Return the head and the rows of the table of final numbers; the first is before training."""
    finals = [final_measures(group) for group in groups]
    before = first_measures(runs)
    measures = ordered_measures({name for final in (before, *finals) for name in final})
    head = ["runs", "step", *map(measure_label, measures), "median grad norm", "largest"]
    blank = [MISSING] * 2
    rows = [("before training", ["", "0", *_cells(before, measures), *blank])] if before else []
    for group, final in zip(groups, finals, strict=True):
        steps = sorted({_last_step(run) for run in group.runs})
        row = [str(len(group.runs)), ", ".join(map(str, steps)), *_cells(final, measures)]
        rows.append((group.label, [*row, *_norms(group)]))
    return head, rows


def _cells(found: dict[str, Estimate], names: Sequence[str]) -> list[str]:
    return [
        format_measure({name: found[name].mean, f"{name}_se": found[name].error}, name)
        if name in found
        else MISSING
        for name in names
    ]


def _norms(group: RunGroup) -> list[str]:
    """Return the mean over runs of the median gradient norm, and the largest of all."""
    norms = [[r["grad_norm"] for r in run.metrics if r.get("grad_norm")] for run in group.runs]
    middle = estimate(statistics.median(found) if found else None for found in norms)
    largest = max((max(found) for found in norms if found), default=None)
    return [format_number(middle.mean if middle else None), format_number(largest)]


def _sections(groups: Sequence[RunGroup]) -> list[tuple[str, list[Figure]]]:
    measures = ordered_measures(
        {
            name
            for group in groups
            for run in group.runs
            for e in run.evaluations
            for name in _bare(e)
        }
    )
    accuracies = tuple(
        _Curve(
            measure_label(name).capitalize(),
            "On all held-out prompts.",
            f"eval/{name}",
            "% of prompts" if "pass" in name else "% right",
            _PERCENT,
        )
        for name in measures
        if name == "greedy_accuracy" or "@" in name
    )
    curves = [group.curve for group in groups]
    sections = {"Accuracy": accuracies} | _SECTIONS
    drawn = [(title, _draw(curves, figures)) for title, figures in sections.items()]
    drawn.insert(2, ("Rewards at the end", _reward_figures(groups)))
    return [(title, figures) for title, figures in drawn if figures]


def _draw(groups: Sequence[overlay.Group], figures: Sequence[_Curve]) -> list[Figure]:
    """Return those of the figures that some run has the metric of."""
    drawn = []
    for title, caption, key, unit, options in figures:
        name = "compare-" + key.replace("/", "-").replace("@", "-at-")
        svg = overlay.curves(name, groups, key, unit, with_legend=False, **options)
        if svg is not None:
            drawn.append(Figure(title, caption, svg))
    return drawn


def _reward_figures(groups: Sequence[RunGroup]) -> list[Figure]:
    named = [(group.label, group.runs[0].diagnostics) for group in groups]
    figures = (
        Figure(
            "Rewards by magnitude",
            "Last record of each first run. Both axes logarithmic; below 1e-6 counts as 0.",
            reward_figures.reward_histograms(named),
        ),
        Figure(
            "Reward by position in the response",
            "Last record of each first run; each panel has its own scale.",
            reward_figures.rewards_by_position(named),
            wide=True,
        ),
    )
    return [figure for figure in figures if figure.svg is not None]


def _bare(evaluation: dict[str, Any]) -> list[str]:
    return [key[5:] for key in evaluation if key[:5] == "eval/"]


def _shown_seed(run: RunRecords) -> str:
    return str(run.config.get("seed", MISSING))


def _last_step(run: RunRecords) -> int:
    return run.metrics[-1]["step"] if run.metrics else 0
