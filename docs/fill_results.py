"""Write a comparison's outcome into docs/results.md, and its figures into docs/results/.

    python docs/fill_results.py runs/chain_sum_compare

What is between <!-- NAME --> and <!-- end of NAME --> is replaced. What is asked of the outcome,
and what counts as an answer, stands in CLAIMS and was settled before the run, but for the claims
that say otherwise.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent
SHOWN_FIGURES = ("accuracy_by_method", "final_accuracy", "gradient_norm", "reward_range")
POWERS = ("power_0.1", "power_1", "power_5")
OTHER_REWARDS = ("log_ratio", "clip", "tanh", "z_score")
COLLAPSE_POINTS = 5.0
"""Percentage points below the start: more than two standard errors of an evaluation."""
MUCH_LARGER = 10.0

Methods = Mapping[str, Mapping[str, Any]]


class Claim(NamedTuple):
    """Something that the paper says, and how it is looked for."""

    text: str
    criterion: str
    look: Callable[[Methods], tuple[str, bool]]
    """Returns what was measured, and whether the claim shows."""


def collapse(methods: Methods) -> tuple[str, bool]:
    """Look for evaluations well below the start: of the log-ratio, and of no power."""
    falls = {}
    for name in ("log_ratio", *POWERS):
        _mean(methods, name, "accuracy_lowest")
        spread = methods[name]["statistics"]
        starts, lowest = (spread[key]["values"] for key in ("accuracy_start", "accuracy_lowest"))
        falls[name] = [100 * (low - start) for start, low in zip(starts, lowest, strict=True)]
    shown = "; ".join(
        f"{name} " + ", ".join(f"{fall:+.1f}" for fall in of_seeds)
        for name, of_seeds in falls.items()
    )
    of_log_ratio = falls.pop("log_ratio")
    most_fall = 2 * sum(fall < -COLLAPSE_POINTS for fall in of_log_ratio) > len(of_log_ratio)
    no_power_falls = min(map(min, falls.values())) >= -COLLAPSE_POINTS
    return f"lowest against the start, points: {shown}", most_fall and no_power_falls


def gradient_ratio(methods: Methods) -> tuple[str, bool]:
    """Compare the log-ratio's gradients with those of each power."""
    ratios = [
        _mean(methods, "log_ratio", "grad_norm_median") / _mean(methods, p, "grad_norm_median")
        for p in POWERS
    ]
    shown = ", ".join(f"{ratio:.0f} x {power}" for ratio, power in zip(ratios, POWERS, strict=True))
    return shown, min(ratios) >= MUCH_LARGER


def bounded_after_the_fact(methods: Methods) -> tuple[str, bool]:
    """Compare the gradients of rewards that are bounded after the fact with power_5's."""
    others = ("clip", "tanh", "z_score")
    ratios = [
        _mean(methods, name, "grad_norm_median") / _mean(methods, "power_5", "grad_norm_median")
        for name in others
    ]
    shown = ", ".join(f"{name} {ratio:.1f} x" for name, ratio in zip(others, ratios, strict=True))
    return f"{shown} power_5", min(ratios) > 1


def faster_gains(methods: Methods) -> tuple[str, bool]:
    """Compare the mean accuracy during training, each power with each other reward."""
    return _all_better(methods, POWERS, OTHER_REWARDS, "accuracy_mean")


def better_when_sampled(methods: Methods) -> tuple[str, bool]:
    """Compare final accuracies at temperature 1, each power with each other reward."""
    return _all_better(methods, POWERS, OTHER_REWARDS, "avg@4_final")


def beats_reverse_kl(methods: Methods) -> tuple[str, bool]:
    """Compare final accuracies with that of the exact reverse KL."""
    return _all_better(methods, POWERS, ("reverse_kl",), "accuracy_final")


def exact_is_no_worse(methods: Methods) -> tuple[str, bool]:
    """Compare the exact power objective with the sampled one that it is the expectation of."""
    return _all_better(methods, ("power_exact",), ("power_1",), "accuracy_mean")


CLAIMS = (
    Claim(
        "The log-ratio collapses early",
        f"most of its seeds have an evaluation more than {COLLAPSE_POINTS:g} points below the "
        "start, and no seed of a power has (the second half was added when the outcome was known: "
        "without it this would say yes, of dips that the powers have too)",
        collapse,
    ),
    Claim(
        "The log-ratio's gradients are far larger than the power reward's",
        f"median norm at least {MUCH_LARGER:g} times that of every alpha",
        gradient_ratio,
    ),
    Claim(
        "Bounding the log-ratio after the fact leaves larger gradients than power",
        "median norm of clip, tanh and z-score above that of alpha 5",
        bounded_after_the_fact,
    ),
    Claim(
        "Power gains faster than the other sampled rewards",
        "mean accuracy during training above each by more than two standard errors, every alpha",
        faster_gains,
    ),
    Claim(
        "Power ends above the other sampled rewards at temperature 1, too (asked after the first "
        "seed was seen, where greedy and sampled accuracy ordered the methods differently)",
        "final avg@4 above each by more than two standard errors, every alpha",
        better_when_sampled,
    ),
    Claim(
        "Power ends above the full-vocabulary reverse KL",
        "final greedy accuracy above it by more than two standard errors, every alpha",
        beats_reverse_kl,
    ),
    Claim(
        "(not of the paper) The exact expectation learns faster than its sampled estimate",
        "mean accuracy during training above power_1's by more than two standard errors",
        exact_is_no_worse,
    ),
)


def claims_table(methods: Methods) -> str:
    """Return what each claim came to, as Markdown; methods that lack finished runs are said."""
    lines = ["| claim | shows if | measured | shows |", "|---|---|---|---|"]
    for claim in CLAIMS:
        try:
            measured, shows = claim.look(methods)
        except KeyError as error:
            lines.append(
                f"| {claim.text} | {claim.criterion} | {error.args[0]} has too few runs | - |"
            )
        else:
            answer = "yes" if shows else "no"
            lines.append(f"| {claim.text} | {claim.criterion} | {measured} | **{answer}** |")
    return "\n".join(lines)


def machine_line(results: Mapping[str, Any]) -> str:
    """Return what the runs were made on."""
    machine, side = results["machine"], results["side_by_side"]
    return (
        f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores; torch "
        f"{machine['torch']}, Python {machine['python']}. {side['jobs']} runs side by side, each "
        f"of {side['ranks']} process with {side['threads']} thread. Seeds: "
        f"{', '.join(map(str, results['seeds']))}."
    )


def settings_table(methods: Methods) -> str:
    """Return what each method has for itself, as Markdown."""
    rows = [
        f"| {name} | "
        + ", ".join(f"`{key} = {value!r}`" for key, value in method["settings"].items())
        + " |"
        for name, method in methods.items()
    ]
    return "\n".join(["| method | its own settings |", "|---|---|", *rows])


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """Return a page with each named block replaced. Raises: ValueError for one that it lacks."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ValueError(f"the page has no {begin.strip()} ... {end}")
        text = f"{before}{begin}\n{block.strip()}\n\n{end}{after}"
    return text


def _all_better(
    methods: Methods, ours: Sequence[str], others: Sequence[str], name: str
) -> tuple[str, bool]:
    shown, is_better = [], []
    for own in ours:
        for other in others:
            difference = 100 * (_mean(methods, own, name) - _mean(methods, other, name))
            error = 100 * math.hypot(_error(methods, own, name), _error(methods, other, name))
            shown.append(f"{own} - {other}: {difference:+.1f} ± {error:.1f}")
            is_better.append(difference > 2 * error)
    return "; ".join(shown), all(is_better)


def _mean(methods: Methods, method: str, name: str) -> float:
    spread = methods[method]["statistics"].get(name)
    if spread is None or spread["standard_error"] is None:
        raise KeyError(method)
    return float(spread["mean"])


def _error(methods: Methods, method: str, name: str) -> float:
    return float(methods[method]["statistics"][name]["standard_error"] or 0.0)


def main() -> None:
    """Fill the page from the folder on the command line."""
    parser = argparse.ArgumentParser(description="Write a comparison's outcome into docs/.")
    parser.add_argument("folder", type=Path, help="output_dir of poweropd compare")
    folder = parser.parse_args().folder
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    page = DOCS / "results.md"
    blocks = {
        "machine": machine_line(results),
        "methods": settings_table(results["methods"]),
        "tables": (folder / "table.md").read_text(encoding="utf-8"),
        "claims": claims_table(results["methods"]),
    }
    page.write_text(filled(page.read_text(encoding="utf-8"), blocks), encoding="utf-8")
    (DOCS / "results").mkdir(exist_ok=True)
    for name in SHOWN_FIGURES:
        shutil.copy(folder / "figures" / f"{name}.svg", DOCS / "results" / f"{name}.svg")


if __name__ == "__main__":
    main()
