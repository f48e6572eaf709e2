"""The comparison's tables: as Markdown, as CSV, and as cells for the page."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from poweropd_megatron.comparison.results import MethodResult
from poweropd_megatron.comparison.statistics import LAST_STEPS, Spread
from poweropd_megatron.telemetry.text import MISSING

NEVER = "never"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A statistic and how it is shown."""

    title: str
    statistic: str
    scale: float = 1.0
    decimals: int | None = None
    """Of the mean and its standard error; None shows three digits of the mean."""
    over_seeds: Literal["mean", "min", "max"] = "mean"
    """mean is shown with its standard error; the extremes are of all seeds."""
    may_be_missing: bool = False
    """Whether runs may finish without it, because they never get there."""


class Table(NamedTuple):
    """One of the comparison's tables."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def tables(
    methods: Sequence[MethodResult], *, thresholds: Sequence[float], num_samples: int
) -> list[Table]:
    """Return the tables of accuracy, of stability and of cost.

    num_samples: the k of avg@k; 0 for evaluations without.
    """
    start = next((r.statistics["accuracy_start"] for m in methods for r in m.finished), None)
    began = f" All begin at {100 * start:.1f} %." if start is not None else ""
    return [
        _table(
            "Accuracy",
            "On the held-out prompts, in percent: mean over the seeds \N{PLUS-MINUS SIGN} its "
            f"standard error.{began} Mean: over the evaluations during training.",
            methods,
            _accuracy_columns(num_samples),
        ),
        _table(
            "Speed of the gains",
            "Steps until the first evaluation with this greedy accuracy; in brackets, how many "
            "of the seeds reached it, which the mean is of.",
            methods,
            [
                Column(
                    title=f"{100 * limit:g} %",
                    statistic=f"step_to_{limit:g}",
                    decimals=0,
                    may_be_missing=True,
                )
                for limit in thresholds
            ]
            + [Column(title="step of the best", statistic="best_step", decimals=0)],
        ),
        _table(
            "Gradients and rewards",
            "Gradient norms are before clipping, over the steps of a run; by reward: divided by "
            "the root mean square of the step's rewards. Rewards are of single tokens, over all "
            "steps; the largest norm, and the lowest and highest reward, are of all seeds.",
            methods,
            GRADIENTS,
        ),
        _table(
            "Signs of a collapse",
            "Lowest accuracy: of the evaluations after the start. KL: from the student's own "
            f"tokens (k1), last {LAST_STEPS} steps. EOS and length: of the rollouts, the lowest "
            "and the longest mean of a step. These extremes are of all seeds.",
            methods,
            COLLAPSE,
        ),
        _table(
            "Cost",
            "A step is rollout, teacher and student, without evaluations and checkpoints. Of the "
            "seeds' medians the fastest: whatever else the machine does only slows a run down.",
            methods,
            COST,
        ),
    ]


def _accuracy_columns(num_samples: int) -> list[Column]:
    percent: dict[str, Any] = {"scale": 100, "decimals": 1}
    sampled = f"avg@{num_samples}"
    return [
        Column(title="final, greedy", statistic="accuracy_final", **percent),
        *(
            [Column(title=f"final, {sampled}", statistic=f"{sampled}_final", **percent)]
            if num_samples
            else []
        ),
        Column(title="best, greedy", statistic="accuracy_best", **percent),
        Column(title="mean, greedy", statistic="accuracy_mean", **percent),
    ]


GRADIENTS = [
    Column(title="norm, median", statistic="grad_norm_median"),
    Column(title="p95", statistic="grad_norm_p95"),
    Column(title="largest", statistic="grad_norm_max", over_seeds="max"),
    Column(title="median by reward", statistic="grad_norm_per_reward_median"),
    Column(title="lowest reward", statistic="reward_min", over_seeds="min"),
    Column(title="highest reward", statistic="reward_max", over_seeds="max"),
]
COLLAPSE = [
    Column(
        title="lowest accuracy",
        statistic="accuracy_lowest",
        scale=100,
        decimals=1,
        over_seeds="min",
    ),
    Column(title="KL to the teacher", statistic="kl_last", decimals=3),
    Column(
        title="lowest EOS rate",
        statistic="eos_rate_lowest",
        scale=100,
        decimals=1,
        over_seeds="min",
    ),
    Column(title="final length", statistic="response_length_final", decimals=1),
    Column(title="longest", statistic="response_length_max", decimals=1, over_seeds="max"),
]
COST = [
    Column(title="seconds a step", statistic="seconds_per_step", over_seeds="min"),
    Column(title="tokens a second", statistic="tokens_per_second", decimals=0, over_seeds="max"),
    Column(
        title="peak memory, GiB",
        statistic="memory_peak_bytes",
        scale=2.0**-30,
        decimals=2,
        over_seeds="max",
    ),
]


def to_markdown(shown: Sequence[Table], failures: Sequence[str]) -> str:
    """Return the tables as Markdown, below each other; failed runs are listed first."""
    parts = [f"- {failure}" for failure in failures]
    blocks = ["\n".join(["Failed, and not in the tables:", "", *parts])] if failures else []
    for table in shown:
        lines = [_line(table.head), "|" + "---|" * len(table.head), *map(_line, table.rows)]
        blocks.append(f"**{table.title}.** {table.note}\n\n" + "\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def to_csv(methods: Sequence[MethodResult]) -> str:
    """Return a line for each run that finished: method, seed and every statistic."""
    rows = [
        {"method": method.name, "seed": run.seed, **run.statistics}
        for method in methods
        for run in method.finished
    ]
    text = io.StringIO()
    names = list(rows[0]) if rows else ["method", "seed"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def failed_runs(methods: Sequence[MethodResult]) -> list[str]:
    """Return a line for each run that is not finished."""
    return [
        f"{method.name} seed {run.seed}: {run.error}"
        for method in methods
        for run in method.runs
        if run.error is not None
    ]


def _table(
    title: str, note: str, methods: Sequence[MethodResult], columns: Sequence[Column]
) -> Table:
    return Table(
        title=title,
        note=note,
        head=["method", *(column.title for column in columns)],
        rows=[
            [_method(method), *(_cell(method.spread(c.statistic), c) for c in columns)]
            for method in methods
        ],
    )


def _method(method: MethodResult) -> str:
    """Return a method's name, with how many of its runs finished where some did not."""
    finished, all_runs = len(method.finished), len(method.runs)
    return method.name if finished == all_runs else f"{method.name} ({finished} of {all_runs} runs)"


def _cell(spread: Spread, column: Column) -> str:
    if spread.mean is None:
        return NEVER if column.may_be_missing and spread.num_runs else MISSING
    if column.over_seeds != "mean":
        extreme = min(spread.values) if column.over_seeds == "min" else max(spread.values)
        return _number(extreme, column, _decimals(extreme, column))
    decimals = _decimals(spread.mean, column)
    text = _number(spread.mean, column, decimals)
    if spread.standard_error is not None:
        text += f" \N{PLUS-MINUS SIGN} {_number(spread.standard_error, column, decimals)}"
    if column.may_be_missing and len(spread.values) < spread.num_runs:
        text += f" ({len(spread.values)} of {spread.num_runs})"
    return text


def _number(value: float, column: Column, decimals: int) -> str:
    return f"{value * column.scale:,.{decimals}f}"


def _decimals(value: float, column: Column) -> int:
    """Return how many decimals show a mean to three digits, where the column doesn't say."""
    if column.decimals is not None:
        return column.decimals
    scaled = abs(value * column.scale)
    return max(0, 2 - math.floor(math.log10(scaled))) if scaled else 2


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
