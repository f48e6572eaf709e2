"""The teacher's hidden states reach the ranks that train on their tokens, whatever the layouts.

A made-up state says which token it is of. Shapes: N tokens in the loss, G hidden.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist
from layout_rows import parallel
from support.rank_pool import RankPool
from torch import Tensor
from training import fixed_labels, fixed_trajectories

from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import Layout, student_layout, teacher_layout
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.batching import Batching
from poweropd_megatron.train.microbatches import cut_batch
from poweropd_megatron.train.teacher_hidden import OwnHidden, copies_of_tokens, exchange

G = 3
LAYOUTS = {
    "one rank": (1, parallel(), parallel(), None),
    "DP2, TP2 teacher": (2, parallel(), parallel(2), None),
    "TP2, DP2 teacher": (2, parallel(2), parallel(), None),
    "PP2, CP2 teacher": (2, parallel(1, 2), parallel(context=2), None),
    "CP2 x DP2, PP2 x TP2 teacher": (4, parallel(context=2), parallel(2, 2), None),
    "TP2 x PP2, DP4 teacher": (4, parallel(2, 2), parallel(), None),
    "DP2 + 2 of a TP2 teacher": (4, parallel(), parallel(2), 2),
    "TP2 + 1": (3, parallel(2), parallel(), 1),
}
"""World size, student, teacher, and the teacher's own ranks."""


def batching_of(layout: Layout, max_tokens_per_microbatch: int | None) -> Batching:
    return Batching.of(
        layout, micro_batch_size=2, max_tokens_per_microbatch=max_tokens_per_microbatch
    )


def rows_of(trajectories: Trajectories, rows: slice) -> Trajectories:
    """Return some sequences, cut to the longest of them."""
    width = int(trajectories.total_lengths_B[rows].max())
    parts = {
        field.name: getattr(trajectories, field.name)[rows]
        for field in fields(trajectories)
        if field.name != "weight_version"
    }
    return replace(
        trajectories,
        **{name: part[:, :width] if part.dim() == 2 else part for name, part in parts.items()},
    )


def hand_over_on_ranks(
    student_parallel: ParallelConfig,
    teacher_parallel: ParallelConfig,
    own: int | None,
    parts: Sequence[slice],
    dtype: torch.dtype,
) -> list[tuple[Tensor, Tensor]] | None:
    """Return, of each of this rank's micro-batches, the tokens' places and the states it got; None
    on ranks that don't speak for a copy of the student.
    """
    cpu_device.install()
    world_size = dist.get_world_size()
    num_student = world_size - (own or 0)
    student = student_layout(
        student_parallel, torch.device("cpu"), seed=1, ranks=range(num_student)
    )
    teacher = teacher_layout(
        teacher_parallel, student, ranks=range(num_student, world_size) if own else None
    )
    trajectories = fixed_trajectories()
    width = trajectories.token_ids_BT.shape[1]
    found = [own_states(trajectories, part, teacher, width, dtype) for part in parts]
    mask_BT, batching = fixed_labels(trajectories).mask_BT, batching_of(student, 15)
    handed = exchange(
        found,
        copies_of_tokens(trajectories, mask_BT, batching),
        teacher=teacher,
        student=student,
        width=G,
        dtype=dtype,
    )
    assert handed.hidden_NG.dtype == dtype
    if not student.speaks_for_model:
        assert not len(handed.place_N)
        return None
    micro_batches = cut_batch(
        trajectories, mask_BT, batching, dp_rank=student.dp_rank, cp_rank=student.cp_rank
    )
    middle = handed[1:4]
    assert torch.equal(middle.hidden_NG[:, 0].long() - width, middle.place_N)
    return [(batch.target_RS[batch.mask_RS], handed.of(batch)) for batch in micro_batches]


def own_states(
    trajectories: Trajectories, rows: slice, teacher: Layout, width: int, dtype: torch.dtype
) -> OwnHidden:
    """Return what this rank's teacher would find of some sequences: places in the whole batch."""
    part = rows_of(trajectories, rows)
    mask_BT, batching = fixed_labels(part).mask_BT, batching_of(teacher, None)
    found = []
    if teacher.holds_model:
        for batch in cut_batch(
            part, mask_BT, batching, dp_rank=teacher.dp_rank, cp_rank=teacher.cp_rank
        ):
            places = batch.target_RS[batch.mask_RS]
            row, column = places // mask_BT.shape[1], places % mask_BT.shape[1]
            whole = (rows.start + row) * width + column
            found.append((places, whole[:, None].expand(-1, G).to(dtype)))
    return OwnHidden.of(
        found if teacher.speaks_for_model else [], copies_of_tokens(part, mask_BT, batching)
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_token_s_state_comes_to_the_copy_that_trains_on_it(name: str, ranks: RankPool) -> None:
    world_size, student, teacher, own = LAYOUTS[name]
    places = fixed_labels(fixed_trajectories()).mask_BT.flatten().nonzero()[:, 0]
    for parts, dtype in (
        ([slice(0, 5)], torch.bfloat16),
        ([slice(0, 2), slice(2, 3), slice(3, 5)], torch.float32),
    ):
        by_rank = ranks.run(
            hand_over_on_ranks, student, teacher, own, parts, dtype, world_size=world_size
        )
        got = [batch for of_rank in by_rank if of_rank is not None for batch in of_rank]
        assert torch.equal(torch.cat([wanted for wanted, _ in got]).sort().values, places)
        for wanted, states in got:
            assert torch.equal(states.long(), wanted[:, None].expand(-1, G))
