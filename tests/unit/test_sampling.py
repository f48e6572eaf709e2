"""Drawn tokens, their log-probs and the filters, against the distributions worked out in Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from poweropd_megatron.rollout.sampling import Sampling, draw_tokens, uniforms

LAST = 1 - 2.0**-53
"""The largest fp64 number below 1."""
GRID = 20_000
"""Rows of the numerical integral over the uniform number."""
FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"top_p": 0.9, "top_k": 5},
    {"top_p": 0.5, "top_k": 3, "temperature": 1.7},
]


def sampling(**settings: float) -> Sampling:
    return Sampling(max_new_tokens=1, **settings)


def distribution(
    logits: list[float], *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[list[float], float]:
    """Return the probabilities after the filters, and the mass that these removed.

    top_k keeps the k likeliest; of these, top_p keeps the fewest likeliest that hold its share.
    """
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    probs = [weight / math.fsum(weights) for weight in weights]
    likeliest = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept = likeliest[: top_k or len(probs)]
    share = top_p * math.fsum(probs[token] for token in kept)
    while top_p < 1 and math.fsum(probs[token] for token in kept[:-1]) >= share:
        kept.pop()
    mass = math.fsum(probs[token] for token in kept)
    return [probs[t] / mass if t in kept else 0.0 for t in range(len(probs))], 1 - mass


def draw_over_grid(logits: Tensor, **settings: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each number of a fine grid over [0, 1) draws from one distribution."""
    grid = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    return draw_tokens(logits.expand(GRID, -1), grid, sampling(**settings))


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_tokens_are_drawn_as_often_as_they_are_likely(settings: dict[str, float]) -> None:
    logits = 2 * torch.randn(13, generator=torch.Generator().manual_seed(3))
    expected, removed = distribution(logits.tolist(), **settings)
    tokens, logp, truncated_mass = draw_over_grid(logits, **settings)
    frequency = torch.bincount(tokens, minlength=13).double() / GRID
    assert (frequency - torch.tensor(expected)).abs().max() <= 1.01 / GRID + 1e-6
    drawn = torch.tensor(expected, dtype=torch.float64)[tokens].log()
    torch.testing.assert_close(logp.double(), drawn, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        truncated_mass, torch.full((GRID,), removed, dtype=torch.float32), rtol=0, atol=1e-6
    )


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    temperature=st.floats(0.2, 4),
    top_k=st.integers(0, 14),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 1)),
    uniform=st.floats(0, LAST),
)
def test_the_log_prob_is_that_of_the_distribution_after_temperature_top_k_and_top_p(
    logits: list[float], temperature: float, top_k: int, top_p: float, uniform: float
) -> None:
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    exact = distribution(logits, **settings)
    for nudge in (-1e-5, 1e-5):
        nudged = {**settings, "top_p": min(max(top_p + nudge, 1e-9), 1.0)}
        assume(top_p == 1 or distribution(logits, **nudged) == exact)
    assume(min(np.diff(np.sort(logits))) > 1e-4)
    expected, removed = exact
    draw = draw_tokens(
        torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64), sampling(**settings)
    )
    token = draw.token_B.item()
    assert expected[token] > 0
    assert draw.logp_B.item() == pytest.approx(math.log(expected[token]), abs=1e-5)
    assert draw.truncated_mass_B.item() == pytest.approx(removed, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.999}], ids=str)
def test_impossible_tokens_are_never_drawn(settings: dict[str, float]) -> None:
    logits = torch.full((6,), -torch.inf)
    logits[2], logits[4] = 0.3, -0.2
    edges = torch.tensor([0.0, 5e-324, 0.3, 0.7, 1 - 2.0**-24, LAST], dtype=torch.float64)
    draw = draw_tokens(logits.expand(6, -1), edges, sampling(**settings))
    assert set(draw.token_B.tolist()) == {2, 4}
    assert draw.logp_B.isfinite().all()


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_possible_token() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -1.0, -200.0]).expand(2, -1)
    draw = draw_tokens(logits, torch.tensor([0.0, LAST], dtype=torch.float64), sampling())
    assert draw.token_B.tolist() == [1, 3]


def test_tokens_too_unlikely_for_fp32_sums_are_still_drawn_equally_often() -> None:
    """A thousand tokens of probability 1e-9 after one of nearly 1, where fp32 has steps of 6e-8."""
    logits = torch.full((1001,), math.log(1e-9))
    logits[0] = 0.0
    tail = 1000 * 1e-9 / (1 + 1000 * 1e-9)
    numbers = 1 - tail * (1 - (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    tokens = draw_tokens(logits.expand(4000, -1), numbers, sampling()).token_B
    counts = torch.bincount(tokens, minlength=1001)[1:]
    assert (counts == 4).sum() > 900


def test_each_token_of_a_large_vocabulary_has_its_share_of_the_unit_interval() -> None:
    columns = 151_936
    logits = torch.zeros(4, columns)
    tokens = torch.tensor([0, 1, 100_000, columns - 1])
    middle = (tokens.double() + 0.5) / columns
    draw = draw_tokens(logits, middle, sampling())
    assert torch.equal(draw.token_B, tokens)
    torch.testing.assert_close(draw.logp_B, torch.full((4,), -math.log(columns)))


def test_temperature_zero_takes_the_likeliest_token_and_reports_its_plain_log_prob() -> None:
    logits = 3 * torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    draw = draw_tokens(logits, torch.rand(50, dtype=torch.float64), sampling(temperature=0.0))
    assert torch.equal(draw.token_B, logits.argmax(dim=1))
    expected = logits.double().log_softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(draw.logp_B.double(), expected, rtol=0, atol=1e-6)
    assert not draw.truncated_mass_B.any()


def test_among_equally_likely_tokens_top_k_keeps_the_first() -> None:
    tokens, logp, mass = draw_over_grid(torch.zeros(5), top_k=2)
    assert torch.bincount(tokens, minlength=5).tolist() == [GRID // 2, GRID // 2, 0, 0, 0]
    torch.testing.assert_close(logp, torch.full((GRID,), -math.log(2)))
    torch.testing.assert_close(mass, torch.full((GRID,), 0.6))


@pytest.mark.parametrize("settings", [{}, {"top_k": 7, "top_p": 0.9}], ids=str)
def test_a_row_is_drawn_the_same_in_any_batch(settings: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(40, 31, generator=generator)
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    together = draw_tokens(logits, uniform, sampling(**settings))
    for row in range(40):
        alone = draw_tokens(logits[row : row + 1], uniform[row : row + 1], sampling(**settings))
        for whole, one in zip(together, alone, strict=True):
            assert torch.equal(whole[row : row + 1], one)


def test_bf16_logits_are_sampled_from_as_fp32() -> None:
    logits = torch.randn(8, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    uniform = torch.linspace(0.01, 0.99, 8, dtype=torch.float64)
    half, single = (draw_tokens(x, uniform, sampling()) for x in (logits, logits.float()))
    assert torch.equal(half.token_B, single.token_B)
    assert torch.equal(half.logp_B, single.logp_B)


def test_random_numbers_depend_on_the_position_and_not_on_how_many_are_asked_for() -> None:
    long = uniforms(seed=7, stream=(0, 3), sequence=5, count=100)
    assert np.array_equal(uniforms(seed=7, stream=(0, 3), sequence=5, count=10), long[:10])


def test_seeds_streams_steps_and_sequences_have_numbers_of_their_own() -> None:
    drawn = [
        uniforms(seed=seed, stream=(purpose, step), sequence=sequence, count=4).tobytes()
        for seed in range(3)
        for purpose in range(2)
        for step in range(5)
        for sequence in range(20)
    ]
    assert len(set(drawn)) == len(drawn)


def test_random_numbers_are_uniform_and_independent_across_sequences() -> None:
    numbers = np.stack([uniforms(seed=1, stream=(0, 0), sequence=i, count=20) for i in range(500)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    ordered = np.sort(numbers.ravel())
    steps = np.arange(1, ordered.size + 1) / ordered.size
    assert np.abs(ordered - steps).max() < 1.95 / math.sqrt(ordered.size)
    neighbours = np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(ordered.size)


@pytest.mark.parametrize("settings", [{"temperature": 0}, *FILTERS], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_a_token_whose_log_prob_says_so(settings, bad):
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 1.0, 2.0]])
    drawn = draw_tokens(logits, torch.full((2,), LAST, dtype=torch.float64), sampling(**settings))
    assert 0 <= int(drawn.token_B[0]) < 3
    assert drawn.logp_B.isnan().tolist() == [True, False]
