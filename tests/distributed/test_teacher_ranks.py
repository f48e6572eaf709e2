"""A teacher on ranks of its own, in parts, off the device: the same responses and scores."""

import pytest
import torch
from decoding import PROMPTS, decode_on_ranks
from layout_rows import parallel, row
from support.rank_pool import RankPool
from torch import Tensor
from training import Row, build_models, fixed_labels

from poweropd_megatron.config.schema import OptimizerConfig, ParallelConfig
from poweropd_megatron.objectives.labels import Labels
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import Trajectories

SAMPLINGS = [
    Sampling(max_new_tokens=12, temperature=0.0),
    Sampling(max_new_tokens=12, temperature=0.9),
]


def decode(
    layout: ParallelConfig,
    folder: str,
    ranks: RankPool,
    world_size: int,
    student_ranks: range | None = None,
    part_size: int = len(PROMPTS),
) -> list[list[Trajectories]]:
    return ranks.run(
        decode_on_ranks,
        layout,
        folder,
        len(PROMPTS),
        SAMPLINGS,
        student_ranks,
        part_size,
        world_size=world_size,
    )


@pytest.mark.parametrize(
    ("layout", "num_student", "world_size", "part_size"),
    [
        (parallel(), 1, 2, 5),
        (parallel(), 1, 2, 2),
        (parallel(2), 2, 4, 2),
        (parallel(1, 2), 2, 3, 1),
        (parallel(), 2, 4, 3),
    ],
    ids=["1+1", "1+1-in-parts", "TP2+2-in-parts", "PP2+1-one-by-one", "DP2+2-in-parts"],
)
def test_every_rank_gets_the_responses_of_one_process_token_for_token(
    layout: ParallelConfig,
    num_student: int,
    world_size: int,
    part_size: int,
    folders: dict[str, str],
    ranks: RankPool,
) -> None:
    folder = folders["student-untied"]
    [expected] = decode(parallel(), folder, ranks, 1)
    by_rank = decode(layout, folder, ranks, world_size, range(num_student), part_size)
    assert len(by_rank) == world_size
    for found in by_rank:
        for trajectories, wanted in zip(found, expected, strict=True):
            assert torch.equal(trajectories.token_ids_BT, wanted.token_ids_BT)
            assert torch.equal(trajectories.prompt_lengths_B, wanted.prompt_lengths_B)
            assert torch.equal(trajectories.total_lengths_B, wanted.total_lengths_B)
            assert torch.equal(trajectories.finish_B, wanted.finish_B)
            torch.testing.assert_close(
                trajectories.behaviour_logp_BT, wanted.behaviour_logp_BT, rtol=1e-5, atol=1e-6
            )


def score_on_ranks(
    layout: Row, student_folder: str, teacher_folder: str
) -> tuple[Tensor, Tensor, Tensor, dict[str, float], list[str]]:
    """Return the scores of a batch whole, again, and in parts of 2, 1 and 2 sequences; the cost of
    them; and the errors of checking the weights before and after rank 0 or the last has changed
    one.
    """
    models = build_models(layout, student_folder, teacher_folder, "fp32", OptimizerConfig(lr=1e-3))
    teacher, trajectories, labels = models.teacher, models.trajectories, models.labels
    assert not any(x.requires_grad for chunk in teacher.chunks for x in chunk.parameters())
    whole, again = (teacher.score(trajectories, labels) for _ in range(2))
    parts = []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        width = int(trajectories.total_lengths_B[rows].max())
        part = Trajectories(
            token_ids_BT=trajectories.token_ids_BT[rows, :width],
            prompt_lengths_B=trajectories.prompt_lengths_B[rows],
            total_lengths_B=trajectories.total_lengths_B[rows],
            finish_B=trajectories.finish_B[rows],
            behaviour_logp_BT=trajectories.behaviour_logp_BT[rows, :width],
            truncated_mass_BT=trajectories.truncated_mass_BT[rows, :width],
            weight_version=0,
        )
        own: Labels = fixed_labels(part)
        parts.append(teacher.score_own(part, own))
    in_parts = teacher.shared(parts)
    teacher.check_unchanged()
    errors = []
    if teacher.chunks and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        next(teacher.chunks[-1].parameters()).data.view(-1)[0] += 1
    try:
        teacher.check_unchanged()
    except RuntimeError as error:
        errors.append(str(error))
    return whole, again, in_parts, teacher.read_cost(), errors


SHARED = row("TP2", 2, parallel(2))
OFFLOADED = row("TP2-offloaded", 2, parallel(2), offload=True)
OWN = row("1+2", 3, parallel(), parallel(1, 2), teacher_ranks=2)


@pytest.mark.parametrize("layout", [SHARED, OFFLOADED, OWN], ids=lambda layout: layout.name)
def test_scores_in_parts_are_those_of_the_whole_batch_and_a_changed_weight_is_found(
    layout: Row, folders: dict[str, str], ranks: RankPool
) -> None:
    by_rank = score(layout, folders, ranks)
    for whole, again, in_parts, _, errors in by_rank:
        assert torch.equal(whole, by_rank[0][0])
        assert torch.equal(again, whole)
        torch.testing.assert_close(in_parts, whole, rtol=1e-5, atol=1e-6)
        assert len(errors) == 1
        assert "the teacher's weights have changed" in errors[0]


def test_scores_of_a_teacher_that_leaves_the_device_are_bitwise_the_same(
    folders: dict[str, str], ranks: RankPool
) -> None:
    on_device, offloaded = (score(layout, folders, ranks) for layout in (SHARED, OFFLOADED))
    for stayed, left in zip(on_device, offloaded, strict=True):
        assert all(map(torch.equal, stayed[:3], left[:3]))
        assert stayed[3] == {}
        assert left[3]["time/teacher_load_seconds"] > 0
        num_bytes = left[3]["memory/teacher_offloaded_bytes"]
        assert 4 * 10_000 < num_bytes < 4 * 100_000, "two layers of hidden size 32 on two ranks"


def test_a_teacher_on_ranks_of_its_own_tells_how_long_it_scored(
    folders: dict[str, str], ranks: RankPool
) -> None:
    costs = [cost for *_, cost, _ in score(OWN, folders, ranks)]
    assert costs == [costs[0]] * 3
    assert list(costs[0]) == ["time/teacher_busy_seconds"]
    assert costs[0]["time/teacher_busy_seconds"] > 0


def score(
    layout: Row, folders: dict[str, str], ranks: RankPool
) -> list[tuple[Tensor, Tensor, Tensor, dict[str, float], list[str]]]:
    return ranks.run(
        score_on_ranks,
        layout,
        folders["student-untied"],
        folders["teacher-untied"],
        world_size=layout.world_size,
    )
