"""The settings of a comparison: read, merged, and checked to differ in the methods' alone."""

import dataclasses
from pathlib import Path

import pytest
from support.made_comparison import METHODS, finish_all, read_recipe

from poweropd_megatron.comparison.plan import check_equal_but_for, check_runs, planned_runs
from poweropd_megatron.comparison.recipe import parse_recipe
from poweropd_megatron.config.load import parse_train_config, read_toml
from poweropd_megatron.config.rules import check
from poweropd_megatron.errors import ConfigError, UserError

BUNDLED = "launch/recipes/chain_sum_compare.toml"


def test_each_method_is_planned_with_each_seed_and_nothing_else_differs(tmp_path):
    runs = planned_runs(read_recipe(tmp_path))
    assert [run.name for run in runs] == [
        *("log_ratio seed 1", "power_1 seed 1", "log_ratio seed 2", "power_1 seed 2")
    ]
    assert [(run.config.objective.kind, run.config.seed) for run in runs] == [
        *(("log_ratio", 1), ("power", 1), ("log_ratio", 2), ("power", 2))
    ]
    assert len({run.config.output_dir for run in runs}) == 4
    first, second = (dataclasses.asdict(run.config) for run in runs[:2])
    for settings in (first, second):
        del settings["output_dir"], settings["objective"]["kind"], settings["objective"]["alpha"]
    assert first == second


def test_a_written_config_is_read_back_as_the_planned_one(tmp_path):
    from poweropd_megatron.comparison.plan import write_configs

    runs = planned_runs(read_recipe(tmp_path))
    write_configs(runs)
    for run in runs:
        assert parse_train_config(["--config", str(run.config_path)]) == run.config


def test_quick_and_the_command_line_change_every_run(tmp_path):
    quick = {"seeds": [7], "train": {"train_steps": 2, "eval": {"max_prompts": 8}}}
    recipe = read_recipe(
        tmp_path,
        *("--quick", "--jobs", "3", "--output_dir", "elsewhere", "--methods", "power_1"),
        *("--train.optimizer.lr", "1e-3", "--train.eval.max_prompts=5"),
        quick=quick,
    )
    (run,) = planned_runs(recipe)
    assert recipe.jobs == 3
    assert str(run.folder) == "elsewhere/runs/power_1/seed_7"
    assert (run.config.train_steps, run.config.eval.max_prompts) == (2, 5)
    assert run.config.optimizer.lr == 1e-3
    assert run.config.eval.num_samples == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds must be a list of different whole numbers from 0, not []"),
        ({"seeds": [1, 1]}, "seeds must be a list of different whole numbers from 0"),
        ({"seeds": [True]}, "seeds must be a list"),
        ({"jobs": 0}, "jobs must be a whole number from 1, not 0"),
        ({"thresholds": [50]}, "thresholds must be a list of different accuracies from 0 to 1"),
        ({"treshold": [0.5]}, "treshold is not a setting of a comparison"),
        ({"methods": {}}, "methods must be a table of methods"),
        ({"methods": {"a/b": {}}}, "'a/b' names a folder"),
        (
            {"methods": {"fast": {"optimizer": {"lr": 1.0}}}},
            r"methods.fast: optimizer.lr must be equal for all methods; only objective.\* may",
        ),
        ({"methods": {"a": {"objective": {"kid": 1}}}}, "objective.kid is not a setting"),
        (
            {"methods": {"a": {"objective": {"alpha": "1"}}}},
            "objective.alpha must be a finite number, not '1'",
        ),
        ({"train": {"seed": 1}}, "train.seed is given for each run by seeds"),
        ({"train": {"output_dir": "x"}}, "train.output_dir is given for each run by output_dir"),
        (
            {"train": {"objective": {"kind": "power"}}},
            "train.objective.kind has no effect: every method has its own",
        ),
        ({"train": {"train_steps": 4}}, "no value for .*student.path"),
        ({"quick": {"methods": METHODS}}, "methods can't differ with --quick"),
        ({"quick": {"seed": [1]}}, "quick.seed is not a setting of a comparison"),
    ],
)
def test_a_bad_recipe_is_refused_by_the_settings_name(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        read_recipe(tmp_path, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs must be a whole number from 1"),
        (["--methods", "power_2"], "'power_2' is not a method of the recipe; it has log_ratio, po"),
        (["--optimizer.lr", "1"], "--optimizer.lr is not an option .* --train.NAME VALUE"),
        (["--train.optimzer.lr", "1"], "optimzer.lr is not a setting; did you mean"),
        (["--train.seed", "1"], "--train.seed is given for each run by seeds"),
        (["--train.objective.alpha", "2"], "power_1 have their own; change it in the recipe"),
    ],
)
def test_a_bad_command_line_is_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path, *arguments)


def test_every_run_is_checked_before_one_starts_and_named(tmp_path):
    methods = METHODS | {"power_0": {"objective": {"kind": "power", "alpha": -1.0}}}
    recipe = read_recipe(tmp_path, methods=methods)
    with pytest.raises(UserError, match=r"power_0 seed 1: objective.alpha must be"):
        check_runs(planned_runs(recipe), recipe.methods, ranks=1)
    assert not recipe.output_dir.exists()


def test_a_methods_setting_without_effect_is_refused_though_it_is_the_default(tmp_path):
    methods = METHODS | {"ratio": {"objective": {"kind": "log_ratio", "alpha": 5.0}}}
    recipe = read_recipe(tmp_path, methods=methods)
    with pytest.raises(UserError, match=r"ratio seed 1: objective.alpha = 5.0 would have no effe"):
        check_runs(planned_runs(recipe), recipe.methods, ranks=1)


def test_ranks_are_checked_against_the_layout(tmp_path):
    recipe = read_recipe(tmp_path, "--train.student.parallel.tensor_model_parallel_size=2")
    with pytest.raises(UserError, match=r"log_ratio seed 1: .*tensor_model_parallel_size"):
        check_runs(planned_runs(recipe), recipe.methods, ranks=1)


def test_settings_that_differ_beyond_the_methods_own_are_found(tmp_path):
    recipe = read_recipe(tmp_path)
    runs = [(run.name, run.method, dataclasses.asdict(run.config)) for run in planned_runs(recipe)]
    check_equal_but_for(recipe.methods, runs)
    runs[3][2]["optimizer"]["lr"] = 1.0
    with pytest.raises(ConfigError, match=r"power_1 seed 2 differs .* optimizer.lr: was 5e-07"):
        check_equal_but_for(recipe.methods, runs)


def test_a_run_made_with_another_setting_is_refused_though_it_could_resume(tmp_path):
    recipe = read_recipe(tmp_path)
    finish_all(recipe)
    check_runs(planned_runs(recipe), recipe.methods, ranks=1)
    changed = read_recipe(tmp_path, "--train.eval.interval=1")
    with pytest.raises(UserError, match=r"with other settings: eval.interval: was 30, is 1"):
        check_runs(planned_runs(changed), changed.methods, ranks=1)


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_the_bundled_recipe_is_the_bundled_tasks_but_for_what_it_says(quick):
    recipe = parse_recipe(["--config", BUNDLED, *quick])
    runs = planned_runs(recipe)
    check_runs(runs, recipe.methods, ranks=recipe.ranks)
    bundled = read_toml(Path("launch/recipes/chain_sum.toml")) if not quick else {}
    differs = {
        name
        for name, value in bundled.items()
        if name in recipe.train and recipe.train[name] != value
    }
    assert differs <= {
        *("student.parallel.tensor_model_parallel_size", "eval.interval", "eval.max_prompts"),
        *("teacher.parallel.tensor_model_parallel_size", "objective.kind", "objective.alpha"),
    }
    for run in runs:
        check(run.config, world_size=1)
