"""What the planner of packed micro-batches promises, for any lengths."""

import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poweropd_megatron.train.packing import Packs, plan_packs

LENGTHS = st.lists(
    st.one_of(st.integers(1, 40), st.sampled_from([1, 50, 51, 100, 101, 300])), max_size=60
)
BUDGETS = st.integers(1, 400)
RANKS = st.integers(1, 5)
MULTIPLES = st.integers(1, 4)


def multiples_of(step: int) -> Callable[[int], int]:
    return lambda count: -(-count // step) * step


def tokens(pack: list[int], lengths: list[int]) -> int:
    return sum(lengths[number] for number in pack)


def largest_spread(values: list[int]) -> int:
    return max(values) - min(values)


@given(lengths=LENGTHS, max_tokens=BUDGETS, num_ranks=RANKS, multiple=MULTIPLES)
def test_each_sequence_is_in_one_micro_batch_and_ranks_have_as_many_micro_batches(
    lengths: list[int], max_tokens: int, num_ranks: int, multiple: int
) -> None:
    plan = plan_packs(
        lengths, max_tokens=max_tokens, num_ranks=num_ranks, round_up=multiples_of(multiple)
    )
    placed = [number for packs in plan for pack in packs for number in pack]
    assert sorted(placed) == list(range(len(lengths)))
    assert len(plan) == num_ranks
    [num_packs] = {len(packs) for packs in plan}
    assert num_packs % multiple == 0
    assert (num_packs == 0) == (not lengths)


@given(lengths=LENGTHS, max_tokens=BUDGETS, num_ranks=RANKS, multiple=MULTIPLES)
def test_the_budget_is_kept_but_for_a_single_longer_sequence(
    lengths: list[int], max_tokens: int, num_ranks: int, multiple: int
) -> None:
    plan = plan_packs(
        lengths, max_tokens=max_tokens, num_ranks=num_ranks, round_up=multiples_of(multiple)
    )
    for packs in plan:
        for pack in packs:
            assert len(pack) <= 1 or tokens(pack, lengths) <= max_tokens
            ordered = [lengths[number] for number in pack]
            assert ordered == sorted(ordered, reverse=True)


def test_a_budget_that_the_micro_batches_just_hold_is_not_exceeded_by_a_token() -> None:
    """Lengths drawn at random hardly ever come to a token more than the budget."""
    draw = random.Random(0)
    for _ in range(300):
        lengths = [draw.randint(1, 40) for _ in range(draw.randint(3, 30))]
        max_tokens = max(*lengths, -(-sum(lengths) // draw.randint(1, 6)))
        [packs] = plan_packs(lengths, max_tokens=max_tokens, num_ranks=1)
        assert max(tokens(pack, lengths) for pack in packs) <= max_tokens


@given(lengths=LENGTHS.filter(bool), max_tokens=BUDGETS, num_ranks=RANKS, multiple=MULTIPLES)
def test_micro_batches_and_ranks_differ_by_at_most_the_longest_sequence(
    lengths: list[int], max_tokens: int, num_ranks: int, multiple: int
) -> None:
    plan = plan_packs(
        lengths,
        max_tokens=max_tokens,
        num_ranks=num_ranks,
        round_up=multiples_of(multiple),
    )
    of_packs = [[tokens(pack, lengths) for pack in packs] for packs in plan]
    of_ranks = [sum(packs) for packs in of_packs]
    assert largest_spread([pack for packs in of_packs for pack in packs]) <= max(lengths)
    assert largest_spread(of_ranks) <= max(lengths)
    best = max(sum(lengths) / num_ranks, max(lengths))
    assert num_ranks == 1 or max(of_ranks) < 2 * best


@given(lengths=LENGTHS.filter(bool), max_tokens=BUDGETS, num_ranks=RANKS, multiple=MULTIPLES)
def test_there_are_no_more_micro_batches_than_always_suffice(
    lengths: list[int], max_tokens: int, num_ranks: int, multiple: int
) -> None:
    """One for each sequence above half the budget, or two for each budget of tokens."""
    plan = plan_packs(
        lengths, max_tokens=max_tokens, num_ranks=num_ranks, round_up=multiples_of(multiple)
    )
    oversized = [length for length in lengths if length > max_tokens]
    long = [length for length in lengths if 2 * length > max_tokens]
    budgets = 2 * (sum(lengths) - sum(oversized)) / max_tokens
    enough = max(len(long), len(oversized) + budgets)
    step = num_ranks * multiple
    assert len(plan[0]) * num_ranks < enough + 1 + step


@given(lengths=LENGTHS, max_tokens=BUDGETS, num_ranks=RANKS, data=st.data())
def test_the_lengths_decide_and_not_the_order_of_the_sequences(
    lengths: list[int], max_tokens: int, num_ranks: int, data: st.DataObject
) -> None:
    def shape(plan: list[Packs], of: list[int]) -> list[list[list[int]]]:
        return [[[of[number] for number in pack] for pack in packs] for packs in plan]

    shuffled = data.draw(st.permutations(lengths))
    plans = [
        plan_packs(order, max_tokens=max_tokens, num_ranks=num_ranks)
        for order in (lengths, lengths, shuffled)
    ]
    assert plans[0] == plans[1]
    assert shape(plans[0], lengths) == shape(plans[2], list(shuffled))


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "num_packs"),
    [
        ([60] * 8 + [40] * 8, 100, 8),
        ([45, 35, 20] * 8, 100, 8),
        ([50] * 9, 100, 5),
        ([51] * 8, 100, 8),
        ([34] * 8, 100, 4),
        ([150, 150, 20, 20], 100, 3),
        ([1] * 100, 100, 1),
    ],
)
def test_what_packs_perfectly_is_packed_perfectly(
    lengths: list[int], max_tokens: int, num_packs: int
) -> None:
    [packs] = plan_packs(lengths, max_tokens=max_tokens, num_ranks=1)
    assert len(packs) == num_packs


def test_micro_batches_of_one_turn_are_of_like_size_on_all_ranks() -> None:
    """So that ranks which exchange experts' tokens in each layer hardly wait for each other."""
    draw = random.Random(0)
    lengths = [min(4096, int(draw.lognormvariate(6, 1)) + 1) for _ in range(1024)]
    plan = plan_packs(lengths, max_tokens=8192, num_ranks=8)
    turns = zip(*([tokens(pack, lengths) for pack in packs] for packs in plan), strict=True)
    assert all(largest_spread(list(turn)) <= 0.05 * 8192 for turn in turns)
    budgets = sum(lengths) / 8192 / 8
    assert len(plan[0]) <= budgets + 1


def test_a_hundred_thousand_sequences_take_seconds() -> None:
    draw = random.Random(0)
    for lengths in (
        [min(16384, int(draw.lognormvariate(7, 0.8)) + 1) for _ in range(100_000)],
        [3500] * 100_000,
        [draw.choice([500, 7000, 16384]) for _ in range(100_000)],
    ):
        begin = time.process_time()
        plan_packs(lengths, max_tokens=16384, num_ranks=64)
        assert time.process_time() - begin < 15


@pytest.mark.parametrize(
    "wrong",
    [{"lengths": [3, 0]}, {"max_tokens": 0}, {"num_ranks": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_numbers_below_one_are_refused(wrong: dict[str, int]) -> None:
    arguments = {"lengths": [3, 4], "max_tokens": 8, "num_ranks": 2}
    with pytest.raises(ValueError, match="at least 1"):
        plan_packs(**{**arguments, **wrong})
