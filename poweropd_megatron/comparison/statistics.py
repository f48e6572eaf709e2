"""What a run's records come to, and what the runs of a method come to over the seeds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from poweropd_megatron.telemetry.axes import Records
from poweropd_megatron.telemetry.groups import estimate
from poweropd_megatron.telemetry.text import ordered_measures
from poweropd_megatron.train.clock import TRAINING_PHASES

LAST_STEPS = 10
"""Steps at the end of training that kl_last is the mean of."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A statistic over the seeds."""

    values: list[float]
    """Of the finished runs that have it, in the order of the seeds."""
    num_runs: int
    """Finished runs; a threshold that some never reach has fewer values."""
    mean: float | None
    standard_error: float | None
    """None for fewer than two values."""


def run_statistics(records: Records, thresholds: Sequence[float]) -> dict[str, float | None]:
    """Return the statistics of a run from the records of metrics.jsonl; None where it has none.

    Evaluations (accuracies from 0 to 1):
      accuracy_start, accuracy_final, accuracy_best, accuracy_lowest: greedy, the lowest after step
      0; accuracy_mean: over all evaluations but that of step 0; avg@k_final; best_step: the first
      of the best accuracy; step_to_T for each threshold T: of the first evaluation at or above it;
      response_length_final and eos_rate_final.
    Steps: grad_norm_median, _p95 and _max, before clipping, where p95 interpolates linearly;
      grad_norm_per_reward_median, the same divided by the root mean square of a step's rewards;
      reward_min and reward_max over every token of every step; kl_last: kl/student_teacher, the
      mean of the last LAST_STEPS; eos_rate_lowest of the rollouts of a step; response_length_max,
      the largest mean of a step's rollouts.
    Cost: seconds_per_step, the median over steps of rollout, teacher and student (evaluations
      and checkpoints left out); tokens_per_second, its median; memory_peak_bytes.
    """
    steps = [record for record in records if record.get("grad_norm") is not None]
    norms = _values(steps, "grad_norm")
    seconds = [_training_seconds(record) for record in steps]
    lasting = _values(steps[-LAST_STEPS:], "kl/student_teacher")
    return {
        **_evaluation_statistics(records, thresholds),
        "grad_norm_median": _reduced(statistics.median, norms),
        "grad_norm_p95": _reduced(_p95, norms),
        "grad_norm_max": _reduced(max, norms),
        "grad_norm_per_reward_median": _reduced(
            statistics.median, _values(steps, "grad_norm_per_reward")
        ),
        "reward_min": _reduced(min, _values(steps, "reward/min")),
        "reward_max": _reduced(max, _values(steps, "reward/max")),
        "kl_last": _reduced(statistics.fmean, lasting),
        "eos_rate_lowest": _reduced(min, _values(steps, "rollout/eos_rate")),
        "response_length_max": _reduced(max, _values(steps, "response_length/mean")),
        "seconds_per_step": _reduced(statistics.median, seconds),
        "tokens_per_second": _reduced(statistics.median, _values(steps, "tokens_per_second")),
        "memory_peak_bytes": _reduced(max, _values(steps, "memory/peak_bytes")),
    }


def spread(runs: Sequence[Mapping[str, float | None]], name: str) -> Spread:
    """Return the mean of a statistic over runs, and its standard error: see telemetry's estimate.

    It is what another set of seeds would move the mean by; that the evaluation has no more prompts
    than it has is not in it.
    """
    values = [value for run in runs if (value := run.get(name)) is not None]
    found = estimate(values)
    return Spread(
        values=values,
        num_runs=len(runs),
        mean=found.mean if found else None,
        standard_error=found.error if found else None,
    )


def _evaluation_statistics(
    records: Records, thresholds: Sequence[float]
) -> dict[str, float | None]:
    evaluated = [record for record in records if record.get("eval/greedy_accuracy") is not None]
    accuracy = {record["step"]: record["eval/greedy_accuracy"] for record in evaluated}
    trained = [value for step, value in accuracy.items() if step > 0]
    best = max(accuracy.values(), default=None)
    last = evaluated[-1] if evaluated else {}
    sampled = [
        name
        for name in ordered_measures([key.removeprefix("eval/") for key in last])
        if name.startswith("avg@")
    ]
    return {
        "accuracy_start": accuracy.get(0),
        "accuracy_final": last.get("eval/greedy_accuracy"),
        **{f"{name}_final": last[f"eval/{name}"] for name in sampled},
        "accuracy_best": best,
        "best_step": _first_step(accuracy, best),
        "accuracy_lowest": _reduced(min, trained),
        "accuracy_mean": _reduced(statistics.fmean, trained),
        **{f"step_to_{limit:g}": _first_step(accuracy, limit) for limit in thresholds},
        "response_length_final": last.get("eval/response_length"),
        "eos_rate_final": last.get("eval/eos_rate"),
    }


def _first_step(accuracy: Mapping[int, float], limit: float | None) -> float | None:
    reached = (step for step, value in accuracy.items() if limit is not None and value >= limit)
    return next(reached, None)


def _p95(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.95))


def _training_seconds(record: Mapping[str, Any]) -> float:
    return sum(record.get(f"time/{phase}_seconds") or 0.0 for phase in TRAINING_PHASES)


def _values(records: Records, name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def _reduced(reduce: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    return reduce(values) if values else None
