"""Each rank's place in a layout, and a forward that goes through pipeline stages."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layout_rows import parallel
from support.rank_pool import RankPool
from torch import Tensor

from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.models.build import build_model
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import Layout, student_layout, teacher_layout
from poweropd_megatron.parallel.pipeline import forward_stage

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a layout says of a rank, and the sum of the ranks of each of its groups."""

    tp: tuple[int, int]
    pp: tuple[int, int]
    cp: tuple[int, int]
    dp: tuple[int, int]
    copy: tuple[int, int]
    is_first_stage: bool
    is_last_stage: bool
    speaks_for_model: bool
    speaker: int
    tp_ranks: list[int]
    pp_ranks: list[int]
    cp_ranks: list[int]
    dp_ranks: list[int]
    copies: list[int]
    model_ranks: list[int]


def place_of(layout: Layout) -> Place:
    groups = layout.groups
    return Place(
        tp=(layout.tp_rank, layout.tp_size),
        pp=(layout.pp_rank, layout.pp_size),
        cp=(layout.cp_rank, layout.cp_size),
        dp=(layout.dp_rank, layout.dp_size),
        copy=(layout.copy_rank, layout.num_copies),
        is_first_stage=layout.is_first_stage,
        is_last_stage=layout.is_last_stage,
        speaks_for_model=layout.speaks_for_model,
        speaker=layout.speaker,
        tp_ranks=members(groups.tp),
        pp_ranks=members(groups.pp),
        cp_ranks=members(groups.cp),
        dp_ranks=members(groups.dp),
        copies=members(groups.dp_cp),
        model_ranks=members(groups.mp),
    )


def members(group: dist.ProcessGroup) -> list[int]:
    """Return the ranks that an exchange over the group reaches."""
    ranks: list[int | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, dist.get_rank(), group=group)
    return sorted(rank for rank in ranks if rank is not None)


def find_places(student: ParallelConfig, teacher: ParallelConfig) -> tuple[Place, Place]:
    cpu_device.install()
    layout = student_layout(student, CPU, seed=1)
    return place_of(layout), place_of(teacher_layout(teacher, layout))


def expected_place(
    rank: int, world_size: int, tensor: int, pipeline: int, context: int = 1
) -> Place:
    """Return a rank's place where tensor ranks come first, then context, data, pipeline ranks."""
    data = world_size // (tensor * pipeline * context)
    at = {
        (t, c, d, p): t + tensor * (c + context * (d + data * p))
        for t in range(tensor)
        for c in range(context)
        for d in range(data)
        for p in range(pipeline)
    }
    [(t, c, d, p)] = [place for place, number in at.items() if number == rank]
    return Place(
        tp=(t, tensor),
        pp=(p, pipeline),
        cp=(c, context),
        dp=(d, data),
        copy=(c + context * d, context * data),
        is_first_stage=p == 0,
        is_last_stage=p == pipeline - 1,
        speaks_for_model=p == pipeline - 1 and t == 0,
        speaker=at[0, c, d, pipeline - 1],
        tp_ranks=[at[other, c, d, p] for other in range(tensor)],
        pp_ranks=[at[t, c, d, other] for other in range(pipeline)],
        cp_ranks=[at[t, other, d, p] for other in range(context)],
        dp_ranks=[at[t, c, other, p] for other in range(data)],
        copies=[at[t, x, y, p] for y in range(data) for x in range(context)],
        model_ranks=sorted(at[x, c, d, y] for x in range(tensor) for y in range(pipeline)),
    )


@dataclass(frozen=True, kw_only=True)
class ExpertPlace:
    """A rank's share of the experts, who holds the others and copies, who is in step with it."""

    ep: tuple[int, int]
    ep_ranks: list[int]
    copies: list[int]
    model_ranks: list[int]
    copies_in_step: range


def find_expert_places(
    student: ParallelConfig, teacher: ParallelConfig
) -> tuple[ExpertPlace, ExpertPlace]:
    def place(layout: Layout) -> ExpertPlace:
        groups = layout.groups
        assert members(groups.expt_tp) == [dist.get_rank()]
        assert members(groups.tp_ep) == members(groups.ep)
        return ExpertPlace(
            ep=(layout.ep_rank, layout.ep_size),
            ep_ranks=members(groups.ep),
            copies=members(groups.expt_dp),
            model_ranks=members(groups.tp_ep_pp),
            copies_in_step=layout.copies_in_step,
        )

    cpu_device.install()
    layout = student_layout(student, CPU, seed=1)
    return place(layout), place(teacher_layout(teacher, layout))


def expected_expert_place(rank: int, world_size: int, parallel: ParallelConfig) -> ExpertPlace:
    """Return a rank's place where expert ranks come first, then copies, then pipeline ranks."""
    expert, tensor = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    stage_size = world_size // parallel.pipeline_model_parallel_size
    stage, place = divmod(rank, stage_size)
    first = stage * stage_size + place // expert * expert
    return ExpertPlace(
        ep=(place % expert, expert),
        ep_ranks=list(range(first, first + expert)),
        copies=[stage * stage_size + n for n in range(stage_size) if n % expert == place % expert],
        model_ranks=sorted(
            place // expert * expert + n + other
            for n in range(expert)
            for other in range(0, world_size, stage_size)
        ),
        copies_in_step={
            (1, 2): range(place // 2 * 2, place // 2 * 2 + 2),
            (1, 4): range(4),
            (2, 4): range(2),
        }.get((tensor, expert), range(place // tensor, place // tensor + 1)),
    )


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (parallel(expert=2), parallel(expert=4)),
        (parallel(2), parallel(1, 2, expert=2)),
        (parallel(2, expert=4), parallel(2, expert=2)),
        (parallel(1, 2, expert=2), parallel(2, 2, expert=2)),
        (parallel(4, expert=2), parallel()),
    ],
    ids=str,
)
def test_both_models_place_expert_ranks_first_then_copies_then_pipeline(
    student: ParallelConfig, teacher: ParallelConfig, ranks: RankPool
) -> None:
    places = ranks.run(find_expert_places, student, teacher, world_size=4)
    assert places == [
        tuple(expected_expert_place(rank, 4, parallel) for parallel in (student, teacher))
        for rank in range(4)
    ]


@pytest.mark.parametrize(
    ("world_size", "student", "teacher"),
    [
        (4, (2, 2), (2, 2)),
        (4, (2, 1), (1, 2)),
        (4, (1, 1, 2), (1, 2, 2)),
        (4, (2, 1, 2), (1, 1, 4)),
        (4, (1, 2), (2, 1)),
        (4, (1, 1), (2, 2)),
        (4, (1, 4), (4, 1)),
        (2, (2, 1), (1, 1)),
        (1, (1, 1), (1, 1)),
    ],
)
def test_both_models_place_ranks_tensor_first_then_context_then_data_then_pipeline(
    world_size: int, student: tuple[int, ...], teacher: tuple[int, ...], ranks: RankPool
) -> None:
    """Sizes of tensor, pipeline and context parallelism."""
    layouts = [
        parallel(*sizes[:2], context=sizes[2] if len(sizes) > 2 else 1)
        for sizes in (student, teacher)
    ]
    places = ranks.run(find_places, *layouts, world_size=world_size)
    assert places == [
        (
            expected_place(rank, world_size, *student),
            expected_place(rank, world_size, *teacher),
        )
        for rank in range(world_size)
    ]


def hidden_states(*, hidden_states: Tensor, context: float, **_: Any) -> Tensor:
    """Return the last stage's hidden states, scaled so that each call is told from the others."""
    return hidden_states.transpose(0, 1) * context


@torch.no_grad()
def run_stages(
    layout_config: ParallelConfig, folder: str, batches: list[Tensor]
) -> list[Tensor | None]:
    """Return this rank's outcome of forwards that follow each other without waiting."""
    cpu_device.install()
    layout = student_layout(layout_config, CPU, seed=1)
    model = read_model_config(folder, setting="student.path")
    chunks = build_model(model, layout, folder=folder, dtype="fp32", setting="student.path")
    for chunk in chunks:
        chunk.eval()
    return [
        forward_stage(
            chunks,
            layout,
            token_ids_BS,
            output_processor=hidden_states,
            context=float(number + 1),
        )
        for number, token_ids_BS in enumerate(batches)
    ]


@pytest.mark.parametrize(
    ("world_size", "tensor", "pipeline", "virtual"),
    [(2, 1, 2, None), (4, 2, 2, None), (4, 1, 4, None), (4, 1, 2, None), (2, 1, 2, 2)],
)
def test_a_forward_through_stages_is_that_of_one_process_on_the_last_stage_alone(
    world_size: int,
    tensor: int,
    pipeline: int,
    virtual: int | None,
    folders: dict[str, str],
    ranks: RankPool,
) -> None:
    generator = torch.Generator().manual_seed(3)
    batches = [
        torch.randint(37, shape, generator=generator) for shape in ((3, 5), (1, 1), (2, 9), (4, 2))
    ]
    folder = folders["student-untied"]
    [expected] = ranks.run(run_stages, parallel(1, 1), folder, batches, world_size=1)
    by_rank = ranks.run(
        run_stages,
        parallel(tensor, pipeline, virtual=virtual),
        folder,
        batches,
        world_size=world_size,
    )
    for rank, outcomes in enumerate(by_rank):
        if not expected_place(rank, world_size, tensor, pipeline).is_last_stage:
            assert outcomes == [None] * len(batches)
            continue
        for outcome, wanted in zip(outcomes, expected, strict=True):
            torch.testing.assert_close(outcome, wanted, rtol=1e-5, atol=1e-5)
