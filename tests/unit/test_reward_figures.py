"""Figures of rewards, and of the gradient beside them."""

import re

import numpy as np
import pytest
import torch

from poweropd_megatron.objectives.diagnostics import reward_by_position, reward_histogram
from poweropd_megatron.telemetry import figures, reward_figures


def words(svg):
    return re.findall(r">([^<>]+)</text>", svg)


def record(step, rewards):
    reward = torch.tensor([rewards])
    mask = torch.ones_like(reward, dtype=torch.bool)
    return {
        "step": step,
        "reward_by_position": reward_by_position(reward, mask, torch.tensor([0])),
        "reward_histogram": reward_histogram(reward.flatten()),
    }


def test_a_histogram_of_both_signs_reads_from_minus_100_to_100():
    edges, count = reward_figures._histogram(record(1, [-50.0, -1.5, 0.0, 1e-8, 0.3, 0.3]))
    np.testing.assert_allclose(edges, -edges[::-1])
    assert (np.diff(edges) > 0).all()
    assert len(count) == len(edges) - 1
    shown = [(edges[k], edges[k + 1], count[k]) for k in np.flatnonzero(count)]
    assert [number for *_, number in shown] == [1, 1, 2, 2]
    for value, (low, high, _) in zip((-50.0, -1.5, 0.0, 0.3), shown, strict=True):
        assert low <= value <= high


def test_the_first_and_the_last_histogram_are_drawn():
    records = [record(step, [-0.5, 0.1, 0.2]) for step in (10, 20, 30)]
    found = words(reward_figures.reward_histogram(records))
    assert {"step 10", "step 30", "reward", "% of tokens"} < set(found)
    assert "step 20" not in found
    assert reward_figures.reward_histogram([{"step": 1}]) is None


def test_runs_side_by_side_have_a_panel_each_and_those_without_rewards_none():
    named = [("power", [record(10, [0.1, -0.2])]), ("nothing", []), ("clip", [record(10, [1.0])])]
    found = words(reward_figures.rewards_by_position(named))
    assert [word for word in found if word in ("power", "clip", "nothing")] == ["power", "clip"]
    svg = reward_figures.reward_histograms(named)
    assert "var(--series-1)" in svg
    assert "var(--series-3)" in svg
    assert "var(--series-2)" not in svg
    assert reward_figures.rewards_by_position([("nothing", [])]) is None


@pytest.mark.parametrize("clip_grad", [1.0, 0.0, None])
def test_the_norm_is_drawn_raw_and_by_the_rewards_scale_with_what_it_is_clipped_to(clip_grad):
    records = [{"step": 1, "grad_norm": 0.5, "grad_norm_per_reward": 2.0}]
    found = words(figures.gradient_norm(records, clip_grad))
    assert {"gradient norm", "divided by the rewards' rms"} < set(found)
    assert ("clip_grad" in found) == bool(clip_grad)


def test_the_variance_stands_beside_the_squared_norm_where_it_was_estimated():
    records = [{"step": step, "grad_norm": 0.1} for step in range(1, 5)]
    assert figures.gradient_variance(records) is None
    records[3]["grad_variance"] = 0.01
    found = words(figures.gradient_variance(records))
    assert {"variance", "squared norm", "squared L2 norm"} < set(found)
