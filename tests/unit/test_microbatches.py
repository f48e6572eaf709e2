"""Micro-batches hold every sequence once, and what they write back lands where it came from."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.made_trajectories import make
from torch import Tensor

from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.batching import Batching
from poweropd_megatron.train.microbatches import MicroBatch, cut_batch, rows_of

SCHEDULES = [
    {"group_size": group, "num_stages": stages}
    for group, stages in ((1, 1), (1, 1), (2, 2), (3, 2), (5, 3))
]
"""Without virtual stages; in groups of as many micro-batches as stages; in larger ones."""


@st.composite
def batches(draw: st.DrawFn) -> Trajectories:
    lengths = draw(
        st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=12)
    )
    rows = [
        ([10 + number] * prompt, [100 + number] * response)
        for number, (prompt, response) in enumerate(lengths)
    ]
    return make(rows, eos=0)


@st.composite
def batchings(draw: st.DrawFn) -> Batching:
    """Context-parallel ones pad to two slices a rank, of which each rank takes an even share."""
    cp_size = draw(st.sampled_from([1, 1, 2, 3]))
    of_rank = draw(st.sampled_from([1, 2, 4] if cp_size == 1 else [2, 4, 6]))
    return Batching(
        micro_batch_size=draw(st.integers(1, 14)),
        max_tokens_per_microbatch=draw(st.none() | st.integers(1, 60)),
        dp_size=draw(st.integers(1, 4)),
        length_multiple=of_rank * cp_size,
        cp_size=cp_size,
        **draw(st.sampled_from(SCHEDULES)),
    )


def whole_batches(
    trajectories: Trajectories, mask_BT: Tensor, batching: Batching, *, dp_rank: int
) -> list[MicroBatch]:
    """Return the micro-batches of a data-parallel rank, put together from what cp ranks have."""
    by_rank = [
        cut_batch(trajectories, mask_BT, batching, dp_rank=dp_rank, cp_rank=cp_rank)
        for cp_rank in range(batching.cp_size)
    ]
    return [put_together(parts) for parts in zip(*by_rank, strict=True)]


def put_together(parts: Sequence[MicroBatch]) -> MicroBatch:
    """Return the micro-batch whose zig-zag slices these are."""
    size, first = len(parts), parts[0]
    width = first.token_ids_RS.shape[1] * size
    fields = {}
    for name in ("token_ids_RS", "target_RS", "mask_RS"):
        of_sequences = [
            getattr(part, name).split([n // size for n in first.packed_lengths or [width]], dim=1)
            for part in parts
        ]
        slices = []
        for of_ranks in zip(*of_sequences, strict=True):
            halves = [x.chunk(2, dim=1) if size > 1 else (x, x[:, :0]) for x in of_ranks]
            slices += [early for early, _ in halves] + [late for _, late in reversed(halves)]
        fields[name] = torch.cat(slices, dim=1)
    return replace(first, **fields)


@given(trajectories=batches(), batching=batchings())
def test_each_sequence_is_in_one_micro_batch_of_one_rank_whole_and_in_place(
    trajectories: Trajectories, batching: Batching
) -> None:
    """In a padded row from its start, in a packed one from where the sequence before it ends."""
    mask_BT = trajectories.response_mask_BT
    placed = []
    for rank in range(batching.dp_size):
        for batch in whole_batches(trajectories, mask_BT, batching, dp_rank=rank):
            placed += batch.rows_b.tolist()
            width = batch.token_ids_RS.shape[1]
            assert width % batching.length_multiple == 0
            assert batch.mask_RS.shape == batch.target_RS.shape == batch.token_ids_RS.shape
            next_RS = batch.cut(trajectories.token_ids_BT)
            found = list(zip(batch.token_ids_RS, next_RS, batch.mask_RS, strict=True))
            if batching.is_packed:
                lengths = trajectories.total_lengths_B[batch.rows_b].tolist()
                padded = [batching.padded_length(length) for length in lengths]
                padding = width - sum(padded)
                assert 0 <= padding < batching.length_multiple or not lengths
                assert batch.packed_lengths == (*padded, *([padding] if padding else []))
                assert not batch.token_ids_RS[0, sum(padded) :].any()
                assert not batch.mask_RS[0, sum(padded) :].any()
                parts = (x.split(batch.packed_lengths) for x in found[0])
                found = list(zip(*parts, strict=True))
            else:
                assert batch.packed_lengths is None
            for row, (ids, following, mask) in zip(batch.rows_b.tolist(), found, strict=False):
                length = int(trajectories.total_lengths_B[row])
                assert torch.equal(ids[:length], trajectories.token_ids_BT[row, :length])
                assert not ids[length:].any()
                assert torch.equal(following[: length - 1], ids[1:length])
                assert not mask[length - 1 :].any()
                assert following[mask].tolist() == trajectories.response_ids(row)
    assert sorted(placed) == list(range(trajectories.num_sequences))


@given(trajectories=batches(), batching=batchings())
def test_padded_micro_batches_are_full_and_as_long_as_their_longest_sequence(
    trajectories: Trajectories, batching: Batching
) -> None:
    if batching.is_packed:
        return
    for rank in range(batching.dp_size):
        micro_batches = whole_batches(
            trajectories, trajectories.response_mask_BT, batching, dp_rank=rank
        )
        sizes = [len(batch.rows_b) for batch in micro_batches]
        *full, last = [size for size in sizes if size] or [0]
        assert full == [batching.micro_batch_size] * len(full)
        assert last <= batching.micro_batch_size
        assert sizes == sorted(sizes, reverse=True)
        lengths = trajectories.total_lengths_B[rows_of(micro_batches)].tolist()
        assert lengths == sorted(lengths, reverse=True)
        for batch in micro_batches:
            longest = max(trajectories.total_lengths_B[batch.rows_b].tolist(), default=2)
            assert longest <= batch.token_ids_RS.shape[1] < longest + batching.length_multiple


@given(trajectories=batches(), batching=batchings())
def test_a_packed_micro_batch_keeps_the_budget_with_its_padding(
    trajectories: Trajectories, batching: Batching
) -> None:
    budget = batching.max_tokens_per_microbatch
    if budget is None:
        return
    for rank in range(batching.dp_size):
        mask_BT = trajectories.response_mask_BT
        for batch in whole_batches(trajectories, mask_BT, batching, dp_rank=rank):
            assert len(batch.rows_b) <= 1 or batch.token_ids_RS.numel() <= budget


@given(trajectories=batches(), batching=batchings())
def test_all_ranks_have_as_many_micro_batches_and_empty_ones_are_small_and_count_nothing(
    trajectories: Trajectories, batching: Batching
) -> None:
    counts = set()
    for rank in range(batching.dp_size):
        micro_batches = whole_batches(
            trajectories, trajectories.response_mask_BT, batching, dp_rank=rank
        )
        counts.add(len(micro_batches))
        for batch in micro_batches:
            if not len(batch.rows_b):
                assert batch.token_ids_RS.shape == (1, max(batching.length_multiple, 2))
                assert not batch.mask_RS.any()
    [count] = counts
    assert count % batching.group_size == 0 or count % batching.group_size >= batching.num_stages
    assert count >= batching.group_size


@given(trajectories=batches(), batching=batchings())
def test_values_written_back_land_on_the_tokens_that_they_were_cut_from(
    trajectories: Trajectories, batching: Batching
) -> None:
    mask_BT = trajectories.response_mask_BT
    values_BT = 1.0 + torch.arange(mask_BT.numel()).reshape(mask_BT.shape)
    written_BT = torch.zeros(mask_BT.shape)
    for rank in range(batching.dp_size):
        for cp_rank in range(batching.cp_size):
            for batch in cut_batch(trajectories, mask_BT, batching, dp_rank=rank, cp_rank=cp_rank):
                assert not written_BT.flatten()[batch.target_RS[batch.mask_RS]].any()
                batch.put(written_BT, batch.cut(values_BT)[batch.mask_RS])
    assert torch.equal(written_BT, torch.where(mask_BT, values_BT, 0.0))


@given(trajectories=batches(), batching=batchings())
def test_the_padding_fraction_counts_the_positions_of_all_ranks(
    trajectories: Trajectories, batching: Batching
) -> None:
    mask_BT = trajectories.response_mask_BT
    num_positions = sum(
        batch.token_ids_RS.numel()
        for rank in range(batching.dp_size)
        for batch in whole_batches(trajectories, mask_BT, batching, dp_rank=rank)
    )
    lengths = trajectories.total_lengths_B.tolist()
    assert math.isclose(
        batching.padding_fraction([lengths]), 1 - sum(lengths) / num_positions, abs_tol=1e-12
    )


@given(trajectories=batches(), batching=batchings())
def test_padding_takes_nothing_from_the_batch_not_even_nan(
    trajectories: Trajectories, batching: Batching
) -> None:
    position_T = torch.arange(trajectories.token_ids_BT.shape[1])
    is_real_BT = position_T < trajectories.total_lengths_B[:, None]
    values_BT = torch.where(is_real_BT, 1.0, float("nan"))
    for batch in cut_batch(trajectories, trajectories.response_mask_BT, batching, dp_rank=0):
        assert batch.cut(values_BT).isfinite().all()


@pytest.mark.parametrize("budget", [None, 100])
def test_a_first_token_in_the_loss_is_refused(budget: int | None) -> None:
    """In a pack it would be predicted from the sequence before it."""
    trajectories = make([([5, 6], [7, 0]), ([8], [9])], eos=0)
    mask_BT = trajectories.response_mask_BT
    mask_BT[1, 0] = True
    batching = Batching(
        micro_batch_size=2, max_tokens_per_microbatch=budget, dp_size=1, length_multiple=1
    )
    with pytest.raises(ValueError, match="first token"):
        cut_batch(trajectories, mask_BT, batching, dp_rank=0)


def test_only_sequences_beyond_the_budget_with_their_padding_are_oversized() -> None:
    batching = Batching(
        micro_batch_size=1, max_tokens_per_microbatch=10, dp_size=1, length_multiple=4
    )
    assert batching.oversized([7, 8, 9, 30]) == [12, 32]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("more", [0, 1, 2, 5])
def test_the_schedule_gets_the_fewest_micro_batches_that_megatron_takes(
    num_stages: int, more: int
) -> None:
    """Source: what forward_backward_pipelining_with_interleaving of megatron.core refuses."""
    group_size = num_stages + more if num_stages > 1 else 1

    def is_taken(count: int) -> bool:
        last = count % group_size
        return group_size <= count and not 0 < last < num_stages

    batching = Batching(
        micro_batch_size=1,
        max_tokens_per_microbatch=None,
        dp_size=1,
        length_multiple=1,
        group_size=group_size,
        num_stages=num_stages,
    )
    for count in range(1, 40):
        assert batching.scheduled(count) == next(n for n in range(count, 80) if is_taken(n))
