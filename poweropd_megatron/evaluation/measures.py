"""What answers come to: accuracies with standard errors, lengths, how responses ended."""

import math
from collections.abc import Mapping, Sequence

from poweropd_megatron.evaluation.answering import Answer, Series
from poweropd_megatron.evaluation.estimators import mean_and_standard_error, pass_at_k

Answered = Sequence[tuple[Series, Sequence[Answer]]]
"""The series of one file, each with its answers."""


def measures_of(answered: Answered, *, pass_at: Sequence[int]) -> dict[str, float]:
    """Return the measures of one file; lengths and ends are those of its samples if it has some.

    Standard errors are over prompts: the samples of a prompt are not independent.
    """
    measures: dict[str, float] = {}
    for series, answers in answered:
        size = series.num_samples
        correct = [
            sum(answer.verdict.correct for answer in answers[start : start + size])
            for start in range(0, len(answers), size)
        ]
        if series.is_greedy:
            measures |= _with_error("greedy_accuracy", correct)
            continue
        measures |= _with_error(f"avg@{size}", [count / size for count in correct])
        for k in sorted({*pass_at, size}):
            estimates = [pass_at_k(size, count, k) for count in correct]
            measures |= _with_error(f"pass@{k}", estimates)
    _, answers = answered[-1]
    eos_rate = sum(answer.stopped for answer in answers) / len(answers)
    return measures | {
        "response_length": sum(answer.num_tokens for answer in answers) / len(answers),
        "eos_rate": eos_rate,
        "truncation_rate": 1 - eos_rate,
    }


def mean_over_files(by_source: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return each measure's mean over files, and the standard error of that mean."""
    tables = list(by_source.values())
    count = len(tables)
    return {
        name: math.sqrt(sum(table[name] ** 2 for table in tables)) / count
        if name.endswith("_se")
        else sum(table[name] for table in tables) / count
        for name in (tables[0] if tables else {})
    }


def _with_error(name: str, values: Sequence[float]) -> dict[str, float]:
    mean, error = mean_and_standard_error(values)
    return {name: mean, f"{name}_se": error}
