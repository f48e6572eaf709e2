"""Estimates over prompts: means with standard errors, and Pass@k without bias."""

import math
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the estimate of the probability that one of k samples is correct.

    1 - C(n - c, k) / C(n, k), the share of the subsets of k of the n samples that have one of the c
    correct ones: its mean over draws of the samples is 1 - (1 - p)^k for every n >= k. Whole
    numbers up to one correctly rounded division, so that nothing overflows or cancels.
    Source: Chen et al. 2021 (HumanEval), eq. 1.
    Raises: ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"expected 0 <= num_correct <= num_samples and 1 <= k <= num_samples, got "
            f"num_correct {num_correct}, num_samples {num_samples}, k {k}"
        )
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_correct, k)) / subsets


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and its standard error over independent values (0 for fewer than two)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
