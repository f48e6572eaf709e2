import itertools
import math

import numpy as np
import pytest
import torch

from poweropd_megatron.objectives.diagnostics import (
    quantiles,
    reward_by_position,
    reward_histogram,
    reward_map,
    reward_metrics,
    reward_surface,
)


def random_batch(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = -4 * torch.rand(n, generator=generator)
    student = -4 * torch.rand(n, generator=generator)
    return teacher.exp() - student.exp(), teacher, student


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_metrics_equal_numpy_in_fp64(n):
    reward, teacher, student = random_batch(n)
    values = reward.numpy().astype(np.float64)
    metrics = reward_metrics(reward, teacher, student)
    expected = {
        "reward/mean": values.mean(),
        "reward/std": values.std(),
        "reward/rms": np.sqrt((values**2).mean()),
        "reward/min": values.min(),
        "reward/max": values.max(),
        "reward/p05": np.quantile(values, 0.05),
        "reward/p95": np.quantile(values, 0.95),
        "reward/dead_fraction": 0.0,
        "kl/student_teacher": (student.double() - teacher.double()).mean().item(),
    }
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_dead_fraction_counts_only_silent_tokens_about_which_the_models_disagree():
    teacher = torch.tensor([-5.0, -5.0, -0.1, -3.0])
    student = torch.tensor([-7.0, -5.05, -0.5, -2.0])
    reward = torch.tensor([1e-9, 0.0, 0.3, -1e-7])
    assert reward_metrics(reward, teacher, student)["reward/dead_fraction"] == 0.5


def test_a_batch_without_tokens_has_zero_metrics():
    empty = torch.empty(0)
    metrics = reward_metrics(empty, empty, empty)
    assert len(metrics) == 9
    assert set(metrics.values()) == {0.0}


def test_quantiles_pass_the_limit_of_torch_quantile():
    n = 2**24 + 3
    value = torch.arange(n, dtype=torch.float32).flip(0)
    low, middle = quantiles(value, (0.05, 0.5))
    assert low == pytest.approx(0.05 * (n - 1), abs=2)
    assert middle == pytest.approx(0.5 * (n - 1), abs=2)


def test_positions_count_from_the_first_response_token():
    reward = torch.tensor(
        [[9.0, 1.0, 2.0, 3.0, 4.0, 9.0], [9.0, 9.0, 9.0, -1.0, -2.0, 9.0]], dtype=torch.float32
    )
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0]], dtype=torch.bool)
    record = reward_by_position(reward, mask, torch.tensor([1, 3]), num_bins=2)
    assert record == {
        "edges": [0, 2, 4],
        "mean": [0.0, 3.5],
        "min": [-2.0, 3.0],
        "max": [2.0, 4.0],
        "count": [4, 2],
    }


def test_short_responses_get_a_bin_for_each_position():
    reward = torch.tensor([[0.0, 0.25, -0.5, 0.75]])
    mask = torch.tensor([[False, True, False, True]])
    record = reward_by_position(reward, mask, torch.tensor([1]), num_bins=32)
    assert record["edges"] == [0, 1, 2, 3]
    assert record["mean"] == record["min"] == record["max"] == [0.25, None, 0.75]
    assert record["count"] == [1, 0, 1]


@pytest.mark.parametrize("length", [32, 33, 63, 100, 1000])
def test_position_bins_partition_the_response(length):
    reward = torch.arange(length, dtype=torch.float32)[None]
    mask = torch.ones(1, length, dtype=torch.bool)
    record = reward_by_position(reward, mask, torch.tensor([0]))
    edges = record["edges"]
    assert len(edges) == 33
    assert (edges[0], edges[-1]) == (0, length)
    assert record["min"] == edges[:-1]
    assert record["max"] == [edge - 1 for edge in edges[1:]]
    assert record["count"] == [end - start for start, end in itertools.pairwise(edges)]


def test_positions_of_a_masked_batch_are_empty_lists():
    record = reward_by_position(
        torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.tensor([1, 1])
    )
    assert record == {"edges": [0], "mean": [], "min": [], "max": [], "count": []}


def test_the_map_has_the_teacher_in_rows_and_the_student_in_columns():
    teacher = torch.tensor([0.9, 0.9, 1.0, 0.1]).log()
    student = torch.tensor([0.1, 0.2, 0.6, 1.0]).log()
    record = reward_map(torch.tensor([0.8, 0.4, 0.3, -0.9]), teacher, student, num_bins=2)
    assert record["edges"] == [0.0, 0.5, 1.0]
    assert record["count"] == [[0, 1], [2, 1]]
    assert record["mean"][0] == [None, pytest.approx(-0.9)]
    assert record["mean"][1] == [pytest.approx(0.6), pytest.approx(0.3)]


def test_the_map_counts_every_token_once_and_keeps_the_mean():
    reward, teacher, student = random_batch(5000, seed=3)
    record = reward_map(reward, teacher, student)
    count, mean = np.array(record["count"]), np.array(record["mean"], dtype=np.float64)
    expected, _, _ = np.histogram2d(
        teacher.exp().numpy(), student.exp().numpy(), bins=np.linspace(0, 1, 21)
    )
    assert count.sum() == 5000
    assert np.abs(count - expected).sum() <= 4
    assert np.nansum(count * mean) == pytest.approx(reward.double().sum().item(), abs=1e-3)


def test_the_map_of_no_tokens_is_empty_and_of_nan_tokens_is_nan_in_a_corner():
    empty = torch.empty(0)
    record = reward_map(empty, empty, empty, num_bins=2)
    assert record["count"] == [[0, 0], [0, 0]]
    assert record["mean"] == [[None, None], [None, None]]
    nan = torch.tensor([math.nan])
    record = reward_map(nan, nan, nan, num_bins=2)
    assert record["count"] == [[1, 0], [0, 0]]
    assert math.isnan(record["mean"][0][0])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_the_histogram_is_that_of_numpy_over_both_signs(scale):
    generator = torch.Generator().manual_seed(2)
    reward = scale * torch.randn(4000, generator=generator) ** 5
    reward[:7] = torch.tensor([0.0, 1e-7, -1e-7, 500.0, -500.0, 1e-6 / 2, 99.0])
    record = reward_histogram(reward)
    values, edges = reward.double().numpy(), np.array(record["edges"])
    edges[-1] = np.inf
    assert (edges[0], len(edges)) == (1e-6, 33)
    np.testing.assert_array_equal(record["positive"], np.histogram(values, edges)[0])
    np.testing.assert_array_equal(record["negative"], np.histogram(-values, edges)[0])
    assert record["zero"] == (np.abs(values) < 1e-6).sum()
    total = sum(record["positive"]) + sum(record["negative"]) + record["zero"]
    assert total == 4000


def test_a_histogram_edge_belongs_to_the_bin_above():
    record = reward_histogram(torch.tensor([0.1, -0.1, 1.0], dtype=torch.float64))
    assert record["positive"][20] == record["negative"][20] == record["positive"][24] == 1
    assert reward_histogram(torch.empty(0))["zero"] == 0


def test_the_surface_is_the_reward_in_the_middle_of_each_cell_of_the_map():
    middle = (np.arange(4) + 0.5) / 4
    teacher, student = middle[:, None], middle[None]
    surface = reward_surface(lambda a, b: a.exp() ** 5 - b.exp() ** 5, num_bins=4)
    np.testing.assert_allclose(surface, teacher**5 - student**5, atol=1e-6)
    surface = reward_surface(lambda a, b: (a - b).clamp(-1, 1), num_bins=4)
    np.testing.assert_allclose(surface, np.clip(np.log(teacher / student), -1, 1), atol=1e-6)
