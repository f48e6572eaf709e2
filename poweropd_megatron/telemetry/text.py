"""How numbers are worded, on the console and in the report."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from poweropd_megatron.config.objective import KINDS

MISSING = "-"

_MEASURES = {
    "greedy_accuracy": "greedy accuracy",
    "response_length": "mean length (tokens)",
    "eos_rate": "ended with EOS",
    "truncation_rate": "truncated",
}


def evaluation_measures(record: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the values of an evaluation by source: "" for all files, then each file's stem.

    From the keys eval/<measure> and eval/<stem>/<measure> of a record; other keys are left out, so
    that a record without an evaluation gives {}.
    """
    sources: dict[str, dict[str, float | None]] = {}
    for key, value in record.items():
        head, _, rest = key.partition("/")
        if head == "eval" and rest:
            source, _, measure = rest.rpartition("/")
            sources.setdefault(source, {})[measure] = value
    return dict(sorted(sources.items()))


def ordered_measures(names: Iterable[str]) -> list[str]:
    """Return the measures to show, best known first; standard errors and unknown names are not."""
    sampled = [name for name in names if re.fullmatch(r"(avg|pass)@\d+", name)]
    sampled.sort(key=lambda name: (int(name.partition("@")[2]), name))
    order = ["greedy_accuracy", *sampled, "response_length", "eos_rate", "truncation_rate"]
    return [name for name in order if name in names]


def objective_label(objective: Mapping[str, Any]) -> str:
    """Return the reward and its parameters in words, from the settings under `objective`."""
    kind = str(objective.get("kind", "objective not recorded"))
    known = KINDS[kind].settings if kind in KINDS else ()
    parameters = [f"{name} {objective[name]:g}" for name in known if name in objective]
    if objective.get("reward_normalization", "none") != "none":
        parameters.append(f"by {objective['reward_normalization']}")
    return ", ".join([kind, *parameters]).replace("_", "-")


def measure_label(name: str) -> str:
    """Return the words for a measure such as greedy_accuracy."""
    return _MEASURES.get(name, name)


def format_measure(measures: Mapping[str, float | None], name: str) -> str:
    """Return "84.0 % ± 1.2", or "14.3" for a length; the standard error only where it is given."""
    value, error = measures.get(name), measures.get(f"{name}_se")
    if value is None:
        return MISSING
    scale, shown = (
        (1, f"{value:,.1f}") if name == "response_length" else (100, f"{100 * value:.1f} %")
    )
    return shown + (f" ± {scale * error:.1f}" if error is not None else "")


def format_change(before: float | None, after: float | None, name: str) -> str:
    """Return the signed difference: percentage points, or tokens for a length."""
    if before is None or after is None:
        return MISSING
    scale = 1 if name == "response_length" else 100
    return f"{scale * (after - before):+,.1f}"


def format_number(value: float | None) -> str:
    """Return four significant digits, or whole thousands with separators."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_duration(seconds: float | None) -> str:
    """Return "42.3 s", "12 min 5 s" or "3 h 20 min"."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
