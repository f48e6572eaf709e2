"""Pass@k against the enumeration of subsets, and against the probability that it estimates."""

import math
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poweropd_megatron.evaluation.estimators import pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_it_is_the_share_of_subsets_with_a_correct_sample(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        is_correct = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            subsets = [any(chosen) for chosen in combinations(is_correct, k)]
            expected = float(Fraction(sum(subsets), len(subsets)))
            assert pass_at_k(num_samples, num_correct, k) == expected


@given(
    num_samples=st.integers(1, 12),
    k=st.integers(1, 12),
    rate=st.fractions(0, 1, max_denominator=20),
)
def test_its_mean_over_draws_is_the_probability_that_one_of_k_is_correct(
    num_samples: int, k: int, rate: Fraction
) -> None:
    k = min(k, num_samples)
    mean = sum(
        Fraction(pass_at_k(num_samples, count, k))
        * math.comb(num_samples, count)
        * rate**count
        * (1 - rate) ** (num_samples - count)
        for count in range(num_samples + 1)
    )
    assert float(mean) == pytest.approx(float(1 - (1 - rate) ** k), abs=1e-14)


@given(st.integers(1, 3000), st.data())
def test_it_is_exact_for_many_samples(num_samples: int, data: st.DataObject) -> None:
    num_correct = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    miss = Fraction(1)
    for i in range(k):
        miss *= Fraction(max(num_samples - num_correct - i, 0), num_samples - i)
        if miss == 0:
            break
    assert pass_at_k(num_samples, num_correct, k) == float(1 - miss)


def test_its_ends_are_the_mean_and_whether_any_is_correct() -> None:
    assert pass_at_k(8, 3, 1) == 3 / 8
    assert pass_at_k(8, 0, 8) == 0.0
    assert pass_at_k(8, 1, 8) == 1.0


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)]
)
def test_what_can_not_be_estimated_is_refused(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"num_samples {num_samples}, k {k}"):
        pass_at_k(num_samples, num_correct, k)
