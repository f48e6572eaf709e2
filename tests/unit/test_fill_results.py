"""docs/fill_results.py: what the page of results says of made outcomes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from support.made_comparison import finish_all, read_recipe

from poweropd_megatron.comparison import command
from poweropd_megatron.comparison.plan import planned_runs

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def fill():
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("fill_results", DOCS / "fill_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def method(settings=None, **statistics):
    spreads = {
        name: {"values": values, "mean": sum(values) / len(values), "standard_error": 0.01}
        for name, values in statistics.items()
    }
    return {"settings": settings or {}, "statistics": spreads}


def all_methods(**changes):
    """Return made results in which every claim shows."""
    power = {"accuracy_mean": [0.8], "accuracy_final": [0.9], "grad_norm_median": [0.3]}
    other = {"accuracy_mean": [0.5], "accuracy_final": [0.6], "grad_norm_median": [4.0]}
    power |= {"accuracy_start": [0.4], "accuracy_lowest": [0.38], "avg@4_final": [0.7]}
    other |= {"avg@4_final": [0.5]}
    methods = dict.fromkeys(("power_0.1", "power_1", "power_5"), power)
    methods |= dict.fromkeys(("log_ratio", "clip", "tanh", "z_score", "reverse_kl"), other)
    methods["log_ratio"] = other | {
        "accuracy_start": [0.4, 0.4, 0.4],
        "accuracy_lowest": [0.34, 0.3, 0.4],
    }
    methods["power_exact"] = power | {"accuracy_mean": [0.9]}
    for name, values in changes.items():
        methods[name] = methods[name] | values
    return {name: method(**values) for name, values in methods.items()}


def answers(fill, methods):
    return [line.split("|")[-2].strip(" *") for line in fill.claims_table(methods).splitlines()[2:]]


def test_every_claim_shows_where_the_numbers_say_so(fill):
    assert answers(fill, all_methods()) == ["yes"] * 7


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (0, {"log_ratio": {"accuracy_lowest": [0.3, 0.36, 0.4]}}),
        (0, {"power_5": {"accuracy_lowest": [0.34]}}),
        (1, {"log_ratio": {"grad_norm_median": [2.9]}}),
        (2, {"clip": {"grad_norm_median": [0.2]}}),
        (3, {"tanh": {"accuracy_mean": [0.79]}}),
        (4, {"clip": {"avg@4_final": [0.7]}}),
        (5, {"reverse_kl": {"accuracy_final": [0.88]}}),
        (6, {"power_exact": {"accuracy_mean": [0.82]}}),
    ],
)
def test_a_claim_that_the_numbers_do_not_bear_out_is_denied(fill, number, changes):
    denied = answers(fill, all_methods(**changes))
    assert denied[number] == "no"
    assert denied.count("no") == 1


def test_a_method_without_runs_leaves_its_claims_open(fill):
    methods = all_methods()
    methods["reverse_kl"] = {"settings": {}, "statistics": {}}
    del methods["z_score"]
    assert answers(fill, methods) == ["yes", "yes", "-", "-", "-", "-", "yes"]
    assert "z_score has too few runs" in fill.claims_table(methods)


def test_differences_have_the_standard_error_of_both_means(fill):
    text, _ = fill.faster_gains(all_methods())
    assert "power_1 - clip: +30.0 ± 1.4" in text


def test_the_page_is_filled_from_a_comparisons_folder_and_only_there(fill, tmp_path, monkeypatch):
    recipe = read_recipe(tmp_path)
    finish_all(recipe)
    command.report(recipe, planned_runs(recipe), {})
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "results.md").write_text((DOCS / "results.md").read_text())
    monkeypatch.setattr(fill, "DOCS", docs)
    monkeypatch.setattr(sys, "argv", ["fill_results.py", str(recipe.output_dir)])
    fill.main()
    page = (docs / "results.md").read_text()
    assert "| power_1 | 80.0 ± 0.0 | 40.0 ± 0.0 |" in page
    assert "| power_1 | `objective.kind = 'power'`, `objective.alpha = 1.0` |" in page
    machine = json.loads((recipe.output_dir / "results.json").read_text())["machine"]
    assert f"torch {machine['torch']}" in page
    assert "Not filled yet" not in page
    assert "## What can't show here" in page
    for name in fill.SHOWN_FIGURES:
        assert f"results/{name}.svg" in page
        assert (docs / "results" / f"{name}.svg").read_text().startswith("<svg")
    fill.main()
    assert (docs / "results.md").read_text() == page


def test_a_page_without_a_place_for_a_block_is_refused(fill):
    with pytest.raises(ValueError, match=r"no <!-- tables --> ... <!-- end of tables -->"):
        fill.filled("<!-- tables -->\n", {"tables": "x"})
