"""The estimate of the gradient's variance, against all ways to choose the halves."""

import itertools

import numpy as np
import pytest

from poweropd_megatron.objectives.gradient_variance import balanced_signs, variance_metrics


@pytest.mark.parametrize("num_prompts", [2, 3, 4, 5, 6, 7])
def test_the_mean_over_all_halves_is_the_sample_variance_of_the_sum(num_prompts):
    gradients = np.random.default_rng(num_prompts).normal(1.0, 2.0, size=(num_prompts, 11))
    half = num_prompts // 2
    values = [1.0] * half + [-1.0] * half + [0.0] * (num_prompts % 2)
    found = []
    for signs in set(itertools.permutations(values)):
        norm = np.linalg.norm(np.array(signs) @ gradients)
        metrics = variance_metrics(norm, np.linalg.norm(gradients.sum(axis=0)), num_prompts)
        found.append(metrics["grad_variance"])
    expected = num_prompts * gradients.var(axis=0, ddof=1).sum()
    assert np.mean(found) == pytest.approx(expected, rel=1e-12)


def test_it_estimates_the_variance_of_gradients_of_other_prompts():
    rng = np.random.default_rng(0)
    num_prompts, sizes = 16, np.linspace(0.1, 2, 40)
    drawn = 1.0 + sizes * rng.normal(size=(4000, num_prompts, 40))
    sums = drawn.sum(axis=1)
    signs = np.stack([balanced_signs(num_prompts, (7, step)).numpy() for step in range(4000)])
    norms = np.linalg.norm(np.einsum("sp,spd->sd", signs, drawn), axis=1)
    true = num_prompts * (sizes**2).sum()
    found = [
        variance_metrics(norm, float(np.linalg.norm(total)), num_prompts)
        for norm, total in zip(norms, sums, strict=True)
    ]
    variances = np.array([metrics["grad_variance"] for metrics in found])
    assert variances.mean() == pytest.approx(true, rel=0.02)
    assert variances.mean() == pytest.approx(sums.var(axis=0, ddof=1).sum(), rel=0.05)
    fractions = [metrics["grad_variance_fraction"] for metrics in found]
    np.testing.assert_allclose(fractions, variances / np.linalg.norm(sums, axis=1) ** 2)


@pytest.mark.parametrize("num_prompts", [2, 5, 8])
def test_signs_are_balanced_and_every_half_comes_up(num_prompts):
    draws = np.stack([balanced_signs(num_prompts, (3, step)).numpy() for step in range(600)])
    assert (draws.sum(axis=1) == 0).all()
    assert (np.abs(draws).sum(axis=1) == num_prompts - num_prompts % 2).all()
    assert np.abs(draws.mean(axis=0)).max() < 0.2
    again = balanced_signs(num_prompts, (3, 5)).numpy()
    assert (draws[5] == again).all()


def test_a_gradient_of_zero_has_no_fraction():
    assert variance_metrics(0.0, 0.0, 4) == {"grad_variance": 0.0}
