"""One self-contained HTML page about a run, finished or not."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poweropd_megatron.telemetry import figures, reward_figures
from poweropd_megatron.telemetry.axes import Records, first_and_last
from poweropd_megatron.telemetry.page import Figure, render_page
from poweropd_megatron.telemetry.records import RunRecords, read_run
from poweropd_megatron.telemetry.sinks import check_output, replace_text
from poweropd_megatron.telemetry.text import (
    MISSING,
    evaluation_measures,
    format_change,
    format_duration,
    format_measure,
    format_number,
    measure_label,
    objective_label,
    ordered_measures,
)

MAX_SAMPLE_PAIRS = 24
MAX_SAMPLE_CHARACTERS = 6000
"""Of a prompt or a response: the middle of a longer one is left out."""


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Return path, written from the run's records; by default run_dir/report.html.

    What is missing is said there. The same records give the same bytes. It may be called while the
    run is going on.

    Raises: InputError, see read_run; ConfigError for a path that can't be written.
    """
    run = read_run(run_dir)
    path = path or run_dir / "report.html"
    check_output(path)
    page = render_page(
        "report.html",
        models=[_model_name(name, run) for name in ("student", "teacher")],
        objective=_objective(run.objective),
        progress=_progress(run),
        tiles=_tiles(run),
        tables=_evaluation_tables(run.evaluations),
        evaluated_steps=[record["step"] for record in run.evaluations],
        figures=_figures(run),
        samples=_sample_pairs(run.samples),
        last_metrics=sorted(run.metrics[-1].items()) if run.metrics else [],
        config_text=run.config_text,
        number=format_number,
    )
    replace_text(path, page)
    return path


def _figures(run: RunRecords) -> list[Figure]:
    metrics, diagnostics = run.metrics, run.diagnostics
    clip_grad = run.config.get("optimizer", {}).get("clip_grad")
    found = [
        Figure(
            "Accuracy",
            "On all held-out prompts, ± one standard error.",
            figures.accuracy(metrics),
        ),
        Figure(
            "Response length",
            "Mean tokens, EOS included.",
            figures.response_length(metrics),
        ),
        Figure(
            "Gradient norm",
            "Before clipping, raw and by the scale of the rewards.",
            figures.gradient_norm(metrics, clip_grad),
        ),
        Figure(
            "Reward",
            "Above 0: the teacher finds the sampled token likelier.",
            figures.reward(metrics),
        ),
        Figure(
            "Extremes of the reward",
            "Of each step's tokens, in groups of steps.",
            figures.extreme_rewards(metrics),
        ),
        Figure(
            "Rewards by magnitude",
            "Both axes logarithmic; what is smaller than 1e-6 counts as 0.",
            reward_figures.reward_histogram(diagnostics),
        ),
        Figure(
            "Distance from the teacher, and entropy",
            "KL from the sampled tokens (k1): it can dip below 0.",
            figures.kl_and_entropy(metrics),
        ),
        Figure(
            "Dead rewards",
            "Tokens without a reward although the models disagree.",
            figures.dead_rewards(metrics),
        ),
        Figure(
            "Endings",
            "How responses end, and what sampling leaves out.",
            figures.endings(metrics),
        ),
        Figure(
            "Variance of the gradient",
            "An estimate: where it reaches the squared norm, steps are noise.",
            figures.gradient_variance(metrics),
            is_optional=True,
        ),
        Figure(
            "Time per phase",
            "Means over groups of steps; shares of the whole run.",
            figures.time_per_phase(metrics),
        ),
        Figure(
            "Throughput",
            "Prompts and responses through rollout, teacher and student; evaluations don't count.",
            figures.throughput(metrics),
        ),
        Figure(
            "Reward by position in the response",
            "First and last record.",
            reward_figures.reward_by_position(diagnostics),
            wide=True,
        ),
        Figure(
            "Reward by probability",
            "Last record. Above the diagonal the teacher finds the token likelier. Left: what the "
            "reward is everywhere. Middle: its mean over the tokens that were drawn. Right: their "
            "number, on a log scale.",
            reward_figures.reward_map(diagnostics),
            wide=True,
        ),
    ]
    return [figure for figure in found if figure.svg is not None or not figure.is_optional]


def _model_name(role: str, run: RunRecords) -> str:
    path = run.summary.get(role) or run.config.get(role, {}).get("path")
    return "/".join(Path(path).parts[-2:]) if path else f"{role} not recorded"


def _objective(objective: Mapping[str, Any]) -> str:
    rest = [f"terminal {objective['terminal']}"] if "terminal" in objective else []
    return ", ".join([objective_label(objective), *rest])


def _progress(run: RunRecords) -> str:
    steps = run.metrics[-1]["step"] if run.metrics else 0
    if run.summary.get("steps", -1) >= steps:
        return f"{steps} steps, finished"
    total = run.config.get("train_steps", "an unknown number of")
    return f"{steps} of {total} steps, not finished"


def _tiles(run: RunRecords) -> list[tuple[str, str]]:
    """Return (value, label) of the few numbers to see first."""
    metrics = run.metrics
    measures = [evaluation_measures(record).get("", {}) for record in run.evaluations]
    names = ordered_measures(measures[0]) if measures else []
    shown = " \N{RIGHTWARDS ARROW} ".join(
        format_measure({names[0]: measure.get(names[0])}, names[0])
        for measure in (first_and_last(measures) if names else [])
    )
    norms = [r["grad_norm"] for r in metrics if r.get("grad_norm") is not None]
    rates = [r["tokens_per_second"] for r in metrics if r.get("tokens_per_second") is not None]
    seconds = sum(record.get("time/step_seconds") or 0.0 for record in metrics)
    return [
        (shown or MISSING, measure_label(names[0]) if names else "accuracy"),
        (format_number(statistics.median(norms) if norms else None), "median grad norm"),
        (format_number(max(norms, default=None)), "largest grad norm"),
        (format_duration(run.summary.get("train_seconds") or seconds or None), "training time"),
        (format_number(statistics.median(rates) if rates else None), "tokens per second"),
    ]


def _evaluation_tables(
    evaluations: Records,
) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Return for each source its rows of measure, before, after, change."""
    if not evaluations:
        return []
    first = evaluation_measures(evaluations[0])
    last = evaluation_measures(evaluations[-1]) if len(evaluations) > 1 else {}
    tables = []
    for source in sorted(first.keys() | last.keys()):
        before, after = first.get(source, {}), last.get(source, {})
        rows = [
            (
                measure_label(name),
                format_measure(before, name),
                format_measure(after, name),
                format_change(before.get(name), after.get(name), name),
            )
            for name in ordered_measures(before.keys() | after.keys())
        ]
        tables.append((source, rows))
    return tables


def _sample_pairs(samples: Records) -> list[dict[str, Any]]:
    """Return prompts with the responses of the first and of the last evaluation."""
    shown_steps = first_and_last(sorted({sample["step"] for sample in samples}))
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for sample in samples:
        if sample["step"] in shown_steps:
            key = (sample["source"], sample["prompt"])
            pair = pairs.setdefault(key, {"answer": sample["answer"], "responses": {}})
            shown = {**sample, "response": _shortened(sample["response"])}
            pair["responses"].setdefault(sample["step"], shown)
    return [
        {
            "source": source,
            "prompt": _shortened(prompt),
            "answer": pair["answer"],
            "responses": [(step, pair["responses"].get(step)) for step in shown_steps],
        }
        for (source, prompt), pair in list(pairs.items())[:MAX_SAMPLE_PAIRS]
    ]


def _shortened(text: str) -> str:
    left_out = len(text) - MAX_SAMPLE_CHARACTERS
    if left_out <= 0:
        return text
    half = MAX_SAMPLE_CHARACTERS // 2
    return f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"
