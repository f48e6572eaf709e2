"""A run's and a method's statistics, against numpy."""

import numpy as np
import pytest
from support.made_comparison import records

from poweropd_megatron.comparison.statistics import run_statistics, spread


def test_gradient_norms_and_rewards_are_those_of_numpy():
    random = np.random.default_rng(0)
    norms, lows, highs = random.lognormal(size=(3, 37))
    lines = [
        {"step": step, "grad_norm": norm, "reward/min": -low, "reward/max": high}
        for step, (norm, low, high) in enumerate(zip(norms, lows, highs, strict=True), start=1)
    ]
    found = run_statistics([{"step": 0, "eval/greedy_accuracy": 0.4}, *lines], [])
    assert found["grad_norm_median"] == pytest.approx(np.median(norms))
    assert found["grad_norm_p95"] == pytest.approx(np.percentile(norms, 95))
    assert found["grad_norm_max"] == norms.max()
    assert (found["reward_min"], found["reward_max"]) == (-lows.max(), highs.max())


def test_accuracies_are_of_the_evaluations_and_the_lowest_is_after_the_start():
    lines = records(0.1, 0.3, 0.6, 0.8, 0.7)
    for line in lines[1::2]:
        del line["eval/greedy_accuracy"], line["eval/avg@2"]
    found = run_statistics(lines, [0.5, 0.6, 0.9])
    assert found["accuracy_start"] == 0.1
    assert found["accuracy_final"] == 0.7
    assert found["avg@2_final"] == 0.35
    assert (found["accuracy_best"], found["best_step"]) == (0.7, 4)
    assert found["accuracy_lowest"] == 0.6
    assert found["accuracy_mean"] == pytest.approx(np.mean([0.6, 0.7]))
    assert (found["step_to_0.5"], found["step_to_0.6"], found["step_to_0.9"]) == (2, 2, None)


def test_the_best_step_is_the_first_of_the_best():
    assert run_statistics(records(0.1, 0.5, 0.4, 0.5), [])["best_step"] == 1


def test_a_step_costs_its_training_and_not_its_evaluation():
    found = run_statistics(records(0.1, 0.2, 0.3), [])
    assert found["seconds_per_step"] == pytest.approx(1.0)
    assert found["memory_peak_bytes"] == 2**30
    assert found["eos_rate_lowest"] == pytest.approx(0.9)


def test_the_last_kl_is_of_the_last_ten_steps():
    lines = records(*[0.1] * 31)
    expected = np.mean([0.1 / step for step in range(21, 31)])
    assert run_statistics(lines, [])["kl_last"] == pytest.approx(expected)


def test_what_a_run_did_not_record_is_none():
    found = run_statistics([{"step": 1, "grad_norm": 2.0}], [0.5])
    assert found["grad_norm_median"] == 2.0
    missing = {name for name, value in found.items() if value is None}
    assert {"reward_min", "accuracy_final", "step_to_0.5", "kl_last"} < missing


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_spread_has_the_standard_error_of_the_mean(count):
    values = np.random.default_rng(count).normal(size=count)
    found = spread([{"x": float(value)} for value in values], "x")
    assert found.values == values.tolist()
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(count))


def test_one_seed_has_no_standard_error_and_none_has_no_mean():
    one = spread([{"x": 0.5}, {"x": None}], "x")
    assert (one.mean, one.standard_error, one.num_runs) == (0.5, None, 2)
    assert spread([], "x").mean is None
