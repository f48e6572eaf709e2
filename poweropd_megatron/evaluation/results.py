"""What an evaluation came to, as results.json has it and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from poweropd_megatron import __version__
from poweropd_megatron.evaluation.answering import Answer, Series
from poweropd_megatron.evaluation.measures import mean_over_files, measures_of
from poweropd_megatron.telemetry.text import format_measure, measure_label, ordered_measures


def results_of(
    all_series: Sequence[Series],
    answers: Sequence[Sequence[Answer]],
    *,
    pass_at: Sequence[int],
) -> dict[str, Any]:
    """Return the measures of each file, their mean over files, and why answers weren't judged."""
    answered = zip(all_series, answers, strict=True)
    files: dict[str, dict[str, Any]] = {}
    for source, group in groupby(answered, key=lambda pair: pair[0].source):
        of_source = list(group)
        failures = Counter(
            answer.verdict.failure
            for _, answers in of_source
            for answer in answers
            if answer.verdict.failure
        )
        files[source] = {
            "num_prompts": len(of_source[0][0].prompts),
            "num_responses": sum(series.num_responses for series, _ in of_source),
            "measures": measures_of(of_source, pass_at=pass_at),
            "answer_failures": dict(sorted(failures.items())),
        }
    by_source = {source: file["measures"] for source, file in files.items()}
    return {"files": files, "mean": mean_over_files(by_source), "version": __version__}


def table_of(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table: a column for each file, and for their mean if there are several.

    Standard errors, after the sign, are over prompts.
    """
    files: Mapping[str, Any] = results["files"]
    columns = {source: file["measures"] for source, file in files.items()}
    if len(columns) > 1:
        columns["mean"] = results["mean"]
    names = ordered_measures(results["mean"])
    rows = [["", *columns]]
    rows.append(["prompts", *(str(file["num_prompts"]) for file in files.values())])
    rows.append(["responses", *(str(file["num_responses"]) for file in files.values())])
    for name in names:
        shown = [format_measure(measures, name) for measures in columns.values()]
        rows.append([measure_label(name), *shown])
    failures = [sum(file["answer_failures"].values()) for file in files.values()]
    rows.append(["not judged (wrong)", *map(str, failures)])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    for source, file in files.items():
        if file["answer_failures"]:
            counts = ", ".join(f"{n} x {why}" for why, n in file["answer_failures"].items())
            lines.append(f"not judged, and counted as wrong, in {source}: {counts}")
    return lines
