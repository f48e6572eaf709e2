"""`poweropd compare`: check everything, train what isn't finished, tell what it came to."""

import os
from collections.abc import Sequence

import torch

from poweropd_megatron.comparison import figures, results, table
from poweropd_megatron.comparison.plan import PlannedRun, check_runs, planned_runs, write_configs
from poweropd_megatron.comparison.pool import Start, run_side_by_side, starter
from poweropd_megatron.comparison.progress import ComparisonProgress
from poweropd_megatron.comparison.recipe import Recipe
from poweropd_megatron.environment import world_size
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.output_dir import locked
from poweropd_megatron.telemetry.page import render_page
from poweropd_megatron.telemetry.sinks import replace_text, write_json_atomically
from poweropd_megatron.telemetry.svg import standalone

EXIT_CODE_FAILED_RUNS = 1


def compare(recipe: Recipe, *, start: Start | None = None) -> int:
    """Return 0 once every run is finished and told of, 1 where some failed.

    start: how a run is started, `poweropd train` in processes of their own by default.
    Raises: UserError before any run is started; Interrupted, with the runs ended.
    """
    if (world_size() or 1) > 1:
        raise ConfigError(
            "poweropd compare starts its runs' ranks itself: run it without torchrun, and set "
            "`ranks` in the recipe"
        )
    runs = planned_runs(recipe)
    check_runs(runs, recipe.methods, ranks=recipe.ranks)
    if recipe.report_only:
        report(recipe, runs, {})
        return 0
    with locked(recipe.output_dir):
        failures = _train(recipe, runs, start or _starter(recipe))
        failed = report(recipe, runs, failures)
    return EXIT_CODE_FAILED_RUNS if failed else 0


def report(
    recipe: Recipe, runs: Sequence[PlannedRun], failures: dict[PlannedRun, str | None]
) -> list[str]:
    """Write table.md, runs.csv, results.json, figures/*.svg and comparison.html; print the table.

    Returns a line for each run that is not finished. The same records give the same bytes.
    """
    methods = results.collect(recipe, runs, failures)
    shown = table.tables(
        methods,
        thresholds=recipe.thresholds,
        num_samples=recipe.train["eval.num_samples"],
    )
    failed = table.failed_runs(methods)
    drawn = figures.figures(methods)
    folder = recipe.output_dir
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    markdown = table.to_markdown(shown, failed)
    replace_text(folder / "table.md", markdown)
    replace_text(folder / "runs.csv", table.to_csv(methods))
    write_json_atomically(folder / "results.json", results.to_json(recipe, methods))
    for name, figure in drawn.items():
        if figure.svg is not None:
            replace_text(folder / "figures" / f"{name}.svg", standalone(figure.svg))
    page = render_page(
        "methods.html",
        methods=methods,
        tables=shown,
        failed=failed,
        figures=list(drawn.values()),
        seeds=recipe.seeds,
        settings=recipe.train,
        machine=results.machine(),
    )
    replace_text(folder / "comparison.html", page)
    print(f"\n{markdown}\n{folder / 'comparison.html'}")
    return failed


def _train(
    recipe: Recipe, runs: Sequence[PlannedRun], start: Start
) -> dict[PlannedRun, str | None]:
    waiting = [run for run in runs if not run.is_finished]
    write_configs(waiting)
    with ComparisonProgress(
        num_runs=len(runs), num_waiting=len(waiting), jobs=recipe.jobs
    ) as progress:
        progress.say(
            f"runs: {len(runs)} ({len(recipe.methods)} methods x {len(recipe.seeds)} seeds), "
            f"finished before: {len(runs) - len(waiting)}; side by side: {recipe.jobs}, ranks of "
            f"each: {recipe.ranks}, threads of each rank: {recipe.threads}"
        )
        return run_side_by_side(waiting, jobs=recipe.jobs, start=start, listener=progress)


def _starter(recipe: Recipe) -> Start:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (
        visible.split(",")
        if visible is not None
        else [str(number) for number in range(torch.cuda.device_count())]
    )
    return starter(
        ranks=recipe.ranks,
        threads=recipe.threads,
        devices=[device for device in devices if device],
    )
