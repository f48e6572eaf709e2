"""Micro-batches hold every row once, and what they write back lands where it came from."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.made_trajectories import make

from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.microbatches import fill_up, plan


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


def layout(tp_size: int, sequence_parallel: bool) -> Any:
    return SimpleNamespace(
        tp_size=tp_size, parallel=SimpleNamespace(sequence_parallel=sequence_parallel)
    )


@given(
    trajectories=batches(),
    micro_batch_size=st.integers(1, 14),
    tp_size=st.sampled_from([1, 2, 4]),
    sequence_parallel=st.booleans(),
    data=st.data(),
)
def test_each_row_is_in_one_micro_batch_cut_to_its_longest_row(
    trajectories: Trajectories,
    micro_batch_size: int,
    tp_size: int,
    sequence_parallel: bool,
    data: st.DataObject,
) -> None:
    chosen = data.draw(st.sets(st.integers(0, trajectories.num_sequences - 1)))
    rows = torch.tensor(sorted(chosen), dtype=torch.int64)
    mask_BT = trajectories.response_mask_BT
    micro_batches = plan(
        trajectories,
        mask_BT,
        rows,
        layout(tp_size, sequence_parallel),
        micro_batch_size=micro_batch_size,
    )
    planned = [row for batch in micro_batches for row in batch.rows_b.tolist()]
    assert sorted(planned) == rows.tolist()
    sizes = [len(batch.rows_b) for batch in micro_batches]
    assert all(size == micro_batch_size for size in sizes[:-1])
    assert all(0 < size <= micro_batch_size for size in sizes)
    lengths = [int(trajectories.total_lengths_B[row]) for row in planned]
    assert lengths == sorted(lengths, reverse=True)

    multiple = tp_size if sequence_parallel else 1
    for batch in micro_batches:
        longest = int(trajectories.total_lengths_B[batch.rows_b].max())
        width = batch.token_ids_bS.shape[1]
        assert width % multiple == 0
        assert longest <= width < longest + multiple
        assert batch.mask_bS.shape == batch.token_ids_bS.shape
        for row, ids, mask in zip(
            batch.rows_b.tolist(), batch.token_ids_bS, batch.mask_bS, strict=True
        ):
            length = int(trajectories.total_lengths_B[row])
            assert torch.equal(ids[:length], trajectories.token_ids_BT[row, :length])
            assert not ids[length:].any()
            assert ids[mask].tolist() == trajectories.response_ids(row)


@given(
    trajectories=batches(),
    micro_batch_size=st.integers(1, 5),
    tp_size=st.sampled_from([1, 4]),
)
def test_values_written_back_land_on_the_tokens_that_they_were_cut_from(
    trajectories: Trajectories, micro_batch_size: int, tp_size: int
) -> None:
    mask_BT = trajectories.response_mask_BT
    values_BT = 1.0 + torch.arange(mask_BT.numel()).reshape(mask_BT.shape)
    written_BT = torch.zeros(mask_BT.shape)
    for batch in plan(
        trajectories,
        mask_BT,
        torch.arange(trajectories.num_sequences),
        layout(tp_size, sequence_parallel=True),
        micro_batch_size=micro_batch_size,
    ):
        batch.put(written_BT, batch.cut(values_BT)[batch.mask_bS])
    assert torch.equal(written_BT, torch.where(mask_BT, values_BT, 0.0))


@given(trajectories=batches(), micro_batch_size=st.integers(1, 5), multiple=st.integers(1, 5))
def test_filling_up_adds_fewest_micro_batches_without_a_token_in_the_loss(
    trajectories: Trajectories, micro_batch_size: int, multiple: int
) -> None:
    mask_BT = trajectories.response_mask_BT
    two_ranks = layout(2, sequence_parallel=True)
    rows = torch.arange(trajectories.num_sequences)
    planned = plan(trajectories, mask_BT, rows, two_ranks, micro_batch_size=micro_batch_size)
    filled = fill_up(planned, multiple, trajectories, two_ranks)
    assert filled[: len(planned)] == planned
    assert len(filled) % multiple == 0
    assert len(filled) < len(planned) + multiple
    written_BT = torch.ones(mask_BT.shape)
    for batch in filled[len(planned) :]:
        assert batch.token_ids_bS.shape == batch.mask_bS.shape == (1, 2)
        values_N = batch.cut(written_BT)[batch.mask_bS]
        assert len(values_N) == 0
        batch.put(written_BT, values_N)
    assert (written_BT == 1).all()
