"""Figures of several runs over one another."""

import re

import numpy as np
import pytest

from poweropd_megatron.telemetry import overlay
from poweropd_megatron.telemetry.axes import step_groups
from poweropd_megatron.telemetry.overlay import Group
from poweropd_megatron.telemetry.svg import LIGHT, standalone


def run(values, key="grad_norm", first=1):
    return [{"step": first + number, key: value} for number, value in enumerate(values)]


def drawn(group, key="grad_norm", *, scale=1.0, is_log=False):
    return overlay.mean_and_range(group.runs, key, scale, is_log=is_log)


def test_a_line_is_the_mean_over_seeds_and_its_band_their_range():
    seeds = np.random.default_rng(0).normal(size=(3, 12))
    steps, mean, low, high = drawn(Group("power", [run(values) for values in seeds]), scale=100)
    assert steps.tolist() == list(range(1, 13))
    np.testing.assert_allclose(mean, 100 * seeds.mean(axis=0))
    np.testing.assert_allclose(low, 100 * seeds.min(axis=0))
    np.testing.assert_allclose(high, 100 * seeds.max(axis=0))


def test_long_curves_are_means_of_groups_of_steps():
    seeds = np.random.default_rng(0).normal(size=(2, 8000))
    steps, mean, low, _ = drawn(Group("power", [run(values) for values in seeds]))
    of_groups = seeds.reshape(2, 40, 200).mean(axis=2)
    np.testing.assert_allclose(steps, np.arange(1, 8001).reshape(40, 200).mean(axis=1))
    np.testing.assert_allclose(mean, of_groups.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(low, of_groups.min(axis=0), atol=1e-12)


@pytest.mark.parametrize("num_points", [1, 39, 40, 41, 60, 100, 999])
def test_groups_of_steps_hold_every_step_once_and_are_alike(num_points):
    groups = step_groups(num_points, 40)
    np.testing.assert_array_equal(np.concatenate(groups), np.arange(num_points))
    assert len(groups) <= 40
    assert len({len(group) for group in groups[:-1]}) <= 1


def test_on_a_log_axis_the_mean_is_geometric_and_zero_is_left_out():
    group = Group("log-ratio", [run([1.0, 10.0, 0.0]), run([100.0, 10.0, 5.0])])
    steps, mean, low, high = drawn(group, is_log=True)
    assert steps.tolist() == [1, 2]
    np.testing.assert_allclose([mean, low, high], [[10, 10], [1, 10], [100, 10]])


def test_only_steps_that_every_run_has_are_drawn():
    steps, mean, _, _ = drawn(Group("power", [run([1.0, 2.0, 3.0]), run([4.0, None], first=2)]))
    assert (steps.tolist(), mean.tolist()) == ([2], [3.0])
    assert drawn(Group("power", [run([1.0]), run([1.0], first=2)])) is None


def test_one_run_has_its_own_standard_error_for_a_band():
    records = [{"step": 5, "eval/avg@4": 0.5, "eval/avg@4_se": 0.1}]
    steps, mean, low, high = drawn(Group("power", [records]), "eval/avg@4", scale=100)
    np.testing.assert_allclose([steps, mean, low, high], [[5], [50], [40], [60]])


def test_a_figure_names_each_group_that_has_the_metric_and_keeps_its_colour():
    groups = [Group("no norm", [run([1.0], "loss")]), Group("power <5>", [run([1.0, 2.0])])]
    svg = overlay.curves("grad-norm", groups, "grad_norm", "L2 norm")
    words = re.findall(r">([^<>]+)</text>", svg)
    assert "power &lt;5&gt;" in words
    assert {"optimizer step", "L2 norm"} < set(words)
    assert "no norm" not in svg
    assert "var(--series-2)" in svg
    assert "var(--series-1)" not in svg
    assert overlay.curves("loss", groups[1:], "loss", "nats") is None


def test_every_group_of_sixteen_has_its_own_line():
    lines = [svg for svg, _ in overlay.legend([str(number) for number in range(16)])]
    bare = {re.sub(r'id="[^"]*"|#\w+', "", svg) for svg in lines}
    assert len(bare) == 16


def test_a_figure_by_itself_has_the_colours_of_paper():
    svg = standalone(overlay.curves("a", [Group("x", [run([1.0])])], "grad_norm", "norm"))
    assert "var(" not in svg
    assert LIGHT["series-1"] in svg


@pytest.mark.parametrize("values", [[0.001, 900.0], [0.2, 0.5]])
def test_a_log_axis_has_plain_numbers(values):
    svg = overlay.curves("a", [Group("x", [run(values)])], "grad_norm", "norm", is_log=True)
    numbers = [float(word) for word in re.findall(r">([\d.]+)</text>", svg)]
    assert len(numbers) > 2
