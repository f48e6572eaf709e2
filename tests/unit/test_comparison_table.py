"""What a comparison writes about finished, failed and missing runs."""

import csv
import json

import pytest
from support.made_comparison import finish_all, read_recipe

from poweropd_megatron.cli.main import main
from poweropd_megatron.comparison import command, table
from poweropd_megatron.comparison.command import report
from poweropd_megatron.comparison.figures import figures
from poweropd_megatron.comparison.plan import planned_runs
from poweropd_megatron.comparison.results import collect
from poweropd_megatron.comparison.statistics import Spread
from poweropd_megatron.errors import ConfigError


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch):
    """Draw nothing but where a test is about the page: it takes seconds."""
    if "page" not in request.node.name:
        monkeypatch.setattr(command.figures, "figures", lambda _: {})


@pytest.fixture
def recipe(tmp_path):
    """Return a comparison whose runs are finished."""
    recipe = read_recipe(tmp_path)
    finish_all(recipe)
    return recipe


def cells(markdown, method):
    """Return a method's rows of all tables, cell by cell."""
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:2] == "| "]
    return [row for row in rows if row[0] == method]


def test_the_tables_have_means_standard_errors_and_extremes_over_the_seeds(recipe):
    report(recipe, planned_runs(recipe), {})
    markdown = (recipe.output_dir / "table.md").read_text()
    accuracy, speed, gradients, _, cost = cells(markdown, "power_1")
    assert accuracy[1:] == ["80.0 ± 0.0", "40.0 ± 0.0", "90.0 ± 0.0", "75.4 ± 0.1"]
    assert speed[1:] == ["1 ± 0", "3 ± 0", "3 ± 0"]
    assert gradients[1:4] == ["1.25 ± 0.00", "1.92 ± 0.00", "2.00"]
    assert gradients[4:] == ["3.00 ± 0.00", "-0.500", "0.500"]
    assert cost[1:] == ["1.00", "500", "1.00"]
    _, speed, _, collapse, _ = cells(markdown, "log_ratio")
    assert speed[1:3] == ["never", "never"]
    assert collapse[1] == "20.0"
    assert "All begin at 40.0 %." in markdown


def test_the_json_has_every_run_and_the_csv_a_line_for_each(recipe):
    report(recipe, planned_runs(recipe), {})
    told = json.loads((recipe.output_dir / "results.json").read_text())
    power = told["methods"]["power_1"]
    assert power["settings"] == {"objective.kind": "power", "objective.alpha": 1.0}
    assert [run["seed"] for run in power["runs"]] == [1, 2]
    assert power["statistics"]["accuracy_final"]["values"] == [0.8, 0.8]
    assert told["settings"]["train_steps"] == 4
    assert told["machine"]["cores"] >= 1
    with (recipe.output_dir / "runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["seed"]) for line in lines] == [
        *(("log_ratio", "1"), ("log_ratio", "2"), ("power_1", "1"), ("power_1", "2"))
    ]
    assert float(lines[2]["accuracy_final"]) == 0.8


def test_the_page_and_the_figures_stand_alone_and_are_the_same_again(recipe):
    written = []
    for _ in range(2):
        report(recipe, planned_runs(recipe), {})
        names = ["comparison.html", *(f"figures/{name}.svg" for name in ("accuracy", "kl"))]
        written.append([(recipe.output_dir / name).read_bytes() for name in names])
    assert written[0] == written[1]
    page, svg, _ = (text.decode() for text in written[0])
    assert "http" not in page.replace("http://www.w3.org/", "")
    assert page.count("<svg") == 9
    assert "objective.kind = log_ratio" in page
    assert "var(" not in svg
    assert "power_1" in svg


def test_a_failed_run_is_told_of_and_left_out_of_its_methods_mean(tmp_path):
    recipe = read_recipe(tmp_path)
    runs = finish_all(recipe)
    (runs[3].folder / "summary.json").unlink()
    failed = report(recipe, runs, {runs[3]: "exit code 2: a NaN | in step 3"})
    assert failed == ["power_1 seed 2: exit code 2: a NaN | in step 3"]
    markdown = (recipe.output_dir / "table.md").read_text()
    assert markdown.startswith("Failed, and not in the tables:\n\n- power_1 seed 2: exit code 2")
    assert cells(markdown, "power_1 (1 of 2 runs)")[0][1] == "80.0"
    assert "a NaN | in step 3" in (recipe.output_dir / "comparison.html").read_text()


def test_nothing_finished_is_told_of_too(tmp_path, capsys):
    read_recipe(tmp_path)
    assert main(["compare", "--config", str(tmp_path / "recipe.toml"), "--report_only"]) == 0
    said = capsys.readouterr().out
    assert "- log_ratio seed 1: not finished" in said
    assert "| power_1 (0 of 2 runs) | - |" in said


def test_recorded_settings_that_differ_are_refused(tmp_path):
    recipe = read_recipe(tmp_path)
    runs = finish_all(recipe)
    path = runs[2].folder / "config.toml"
    path.write_text(path.read_text().replace("global_batch_size = 8", "global_batch_size = 16"))
    with pytest.raises(ConfigError, match=r"log_ratio seed 2 differs .* global_batch_size: was 8"):
        collect(recipe, runs, {})


def test_a_threshold_that_some_seeds_reach_says_how_many():
    column = table.Column(title="50 %", statistic="x", decimals=0, may_be_missing=True)
    reached = Spread(values=[10.0, 20.0], num_runs=3, mean=15.0, standard_error=5.0)
    assert table._cell(reached, column) == "15 ± 5 (2 of 3)"


def test_figures_of_no_runs_hold_nothing(tmp_path):
    recipe = read_recipe(tmp_path)
    nothing = figures(collect(recipe, planned_runs(recipe), {}))
    assert len(nothing) == 9
    assert not any(figure.svg for figure in nothing.values())
