"""One self-contained HTML page about a run, finished or not."""

import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from poweropd_megatron.errors import InputError
from poweropd_megatron.telemetry import figures
from poweropd_megatron.telemetry.sinks import read_jsonl, replace_text
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


def write_report(run_dir: Path) -> Path:
    """Return run_dir/report.html, written from the run's records; what is missing is said there.

    Reads metrics.jsonl and, where they exist, diagnostics.jsonl, samples.jsonl, summary.json and
    config.toml. The same records give the same bytes. It may be called while the run is going on.

    Raises: InputError if there is no such folder or no metrics.jsonl in it, or a file is malformed.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a folder; give the output_dir of a run")
    if not (run_dir / "metrics.jsonl").is_file():
        raise InputError(f"{run_dir} has no metrics.jsonl; give the output_dir of a run")
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    config_text = _read_text(run_dir / "config.toml")
    config = _parse(run_dir / "config.toml", config_text, tomllib.loads)
    summary = _parse(run_dir / "summary.json", _read_text(run_dir / "summary.json"), json.loads)
    diagnostics = _read_records(run_dir / "diagnostics.jsonl")
    samples = _read_records(run_dir / "samples.jsonl")
    evaluations = [record for record in metrics if evaluation_measures(record)]
    template = resources.files("poweropd_megatron.telemetry").joinpath("report.html")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(template.read_text(encoding="utf-8")).render(
        models=[_model_name(name, config, summary) for name in ("student", "teacher")],
        objective=_objective(summary.get("objective") or config.get("objective") or {}),
        progress=_progress(metrics, config, summary),
        tiles=_tiles(metrics, evaluations, summary),
        tables=_evaluation_tables(evaluations),
        evaluated_steps=[record["step"] for record in evaluations],
        figures=_figures(metrics, diagnostics, config),
        samples=_sample_pairs(samples),
        last_metrics=sorted(metrics[-1].items()) if metrics else [],
        config_text=config_text,
        number=format_number,
    )
    path = run_dir / "report.html"
    replace_text(path, page + "\n")
    return path


class Figure(NamedTuple):
    """A plot, or the lack of one, with its words."""

    title: str
    caption: str
    svg: str | None
    wide: bool = False


def _figures(
    metrics: figures.Records, diagnostics: figures.Records, config: Mapping[str, Any]
) -> list[Figure]:
    clip_grad = config.get("optimizer", {}).get("clip_grad")
    return [
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
            "Reward",
            "Above 0: the teacher finds the sampled token likelier.",
            figures.reward(metrics),
        ),
        Figure(
            "Gradient norm",
            "Before clipping.",
            figures.gradient_norm(metrics, clip_grad),
        ),
        Figure(
            "Distance from the teacher, and entropy",
            "KL from the sampled tokens (k1): it can dip below 0.",
            figures.kl_and_entropy(metrics),
        ),
        Figure(
            "Endings and dead rewards",
            "Dead: no reward although the models disagree.",
            figures.fractions(metrics),
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
            figures.reward_by_position(diagnostics),
            wide=True,
        ),
        Figure(
            "Reward by probability",
            "Last record. Above the diagonal the teacher finds the token likelier. Left: mean "
            "reward. Right: number of tokens, on a log scale.",
            figures.reward_map(diagnostics),
            wide=True,
        ),
    ]


def _model_name(role: str, config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    path = summary.get(role) or config.get(role, {}).get("path")
    return "/".join(Path(path).parts[-2:]) if path else f"{role} not recorded"


def _objective(objective: Mapping[str, Any]) -> str:
    rest = [f"terminal {objective['terminal']}"] if "terminal" in objective else []
    return ", ".join([objective_label(objective), *rest])


def _progress(
    metrics: figures.Records, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
    steps = metrics[-1]["step"] if metrics else 0
    if summary.get("steps", -1) >= steps:
        return f"{steps} steps, finished"
    return f"{steps} of {config.get('train_steps', 'an unknown number of')} steps, not finished"


def _tiles(
    metrics: figures.Records, evaluations: figures.Records, summary: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return (value, label) of the few numbers to see first."""
    measures = [evaluation_measures(record).get("", {}) for record in evaluations]
    names = ordered_measures(measures[0]) if measures else []
    shown = " \N{RIGHTWARDS ARROW} ".join(
        format_measure({names[0]: measure.get(names[0])}, names[0])
        for measure in (figures.first_and_last(measures) if names else [])
    )
    norms = [r["grad_norm"] for r in metrics if r.get("grad_norm") is not None]
    rates = [r["tokens_per_second"] for r in metrics if r.get("tokens_per_second") is not None]
    seconds = sum(record.get("time/step_seconds") or 0.0 for record in metrics)
    return [
        (shown or MISSING, measure_label(names[0]) if names else "accuracy"),
        (format_number(statistics.median(norms) if norms else None), "median grad norm"),
        (format_number(max(norms, default=None)), "largest grad norm"),
        (format_duration(summary.get("train_seconds") or seconds or None), "training time"),
        (format_number(statistics.median(rates) if rates else None), "tokens per second"),
    ]


def _evaluation_tables(
    evaluations: figures.Records,
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


def _sample_pairs(samples: figures.Records) -> list[dict[str, Any]]:
    """Return prompts with the responses of the first and of the last evaluation."""
    shown_steps = figures.first_and_last(sorted({sample["step"] for sample in samples}))
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


def _read_records(path: Path) -> Sequence[dict[str, Any]]:
    return read_jsonl(path) if path.exists() else []


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _parse(path: Path, text: str, parse: Any) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = parse(text) if text else {}
    except ValueError as error:
        raise InputError(f"{path} can't be read: {error}") from error
    return parsed
