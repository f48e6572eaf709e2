"""Packed micro-batches of very different lengths train like padded ones in one process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import error, largest_error
from layout_rows import ONE_PROCESS, parallel, row
from support.made_trajectories import make
from support.rank_pool import RankPool
from training import OPTIMIZER, Measured, Row, build_models, fixed_labels, update_on_ranks

from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.microbatches import cut_batch

TOLERANCE = 1e-5
BUDGET = 60
ROWS = [
    row("one-process", 1, parallel(), max_tokens_per_microbatch=BUDGET),
    row("DP2", 2, parallel(), max_tokens_per_microbatch=BUDGET),
    row("TP2", 2, parallel(2), max_tokens_per_microbatch=BUDGET),
    row("TP2+SP", 2, parallel(2, sequence=True), max_tokens_per_microbatch=BUDGET),
    row("PP2", 2, parallel(1, 2), max_tokens_per_microbatch=BUDGET),
    row("TP2xPP2", 4, parallel(2, 2), max_tokens_per_microbatch=BUDGET),
    row("more-ranks-than-sequences", 4, parallel(), max_tokens_per_microbatch=10),
]


def uneven_trajectories(num_sequences: int = 7) -> Trajectories:
    """Return sequences of 2 to 90 tokens: one beyond the budget, most far below."""
    draw = torch.Generator().manual_seed(5)
    lengths = [(1, 1), (30, 60), (2, 9), (1, 40), (12, 3), (1, 2), (5, 5)][:num_sequences]

    def tokens(count: int) -> list[int]:
        return torch.randint(36, (count,), generator=draw).tolist()

    return make([(tokens(prompt), tokens(response)) for prompt, response in lengths], eos=36)


def run(
    layout: Row, folders: dict[str, str], ranks: RankPool, trajectories: Trajectories
) -> list[Measured]:
    return ranks.run(
        update_on_ranks,
        layout,
        folders["student-tied"],
        folders["teacher-untied"],
        "fp32",
        trajectories,
        world_size=layout.world_size,
    )


@pytest.mark.parametrize("layout", ROWS, ids=lambda layout: layout.name)
def test_packed_layout_trains_like_padded_micro_batches_in_one_process(
    layout: Row, folders: dict[str, str], ranks: RankPool
) -> None:
    trajectories = uneven_trajectories(3 if layout.name.startswith("more-ranks") else 7)
    [padded] = run(ONE_PROCESS, folders, ranks, trajectories)
    by_rank = run(layout, folders, ranks, trajectories)
    for quantity in ("teacher_logp_BT", "logp_UBT", "entropy_UBT", "loss_U", "grad_norm_U"):
        expected = getattr(padded, quantity)
        for packed in by_rank:
            assert error(getattr(packed, quantity), expected) <= TOLERANCE, quantity
    for quantity in ("gradients", "weights"):
        worst, name = largest_error(getattr(by_rank[0], quantity), getattr(padded, quantity))
        assert worst <= TOLERANCE, name
    assert padded.grad_norm_U.min() > OPTIMIZER.clip_grad


def score_and_update(
    layout: Row, student: str, teacher: str, trajectories: Trajectories
) -> tuple[Any, ...]:
    """Return log-probs and the gradient norm of one update, and how many micro-batches it took.

    What the teacher is said to think of tokens outside the loss is NaN.
    """
    models = build_models(layout, student, teacher, "fp32", OPTIMIZER, trajectories)
    teacher_logp_BT = models.teacher.score(trajectories, models.labels)
    outcome = models.update(teacher_logp_BT.masked_fill(~models.labels.mask_BT, float("nan")))
    micro_batches = cut_batch(
        trajectories, models.labels.mask_BT, models.student.batching, dp_rank=0
    )
    figures = (teacher_logp_BT, outcome.logp_BT, outcome.entropy_BT, outcome.grad_norm)
    return (*figures, len(micro_batches))


@pytest.mark.parametrize(
    "layout",
    [ONE_PROCESS, ROWS[0], row("SP", 2, parallel(2, sequence=True), max_tokens_per_microbatch=60)],
    ids=["padded", "packed", "packed-SP"],
)
def test_what_lies_in_the_padding_of_the_batch_reaches_no_result(
    layout: Row, folders: dict[str, str], ranks: RankPool
) -> None:
    """NaN in the float tensors, another token in the ids."""
    clean = uneven_trajectories()
    is_padding_BT = torch.arange(90) >= clean.total_lengths_B[:, None]
    dirty = replace(
        clean,
        token_ids_BT=clean.token_ids_BT.masked_fill(is_padding_BT, 35),
        behaviour_logp_BT=clean.behaviour_logp_BT.masked_fill(is_padding_BT, float("nan")),
    )
    models = (folders["student-tied"], folders["teacher-untied"])
    outcomes = [
        ranks.run(score_and_update, layout, *models, batch, world_size=layout.world_size)[0]
        for batch in (clean, dirty)
    ]
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_packing_takes_fewer_micro_batches_and_all_of_the_batch(
    folders: dict[str, str], ranks: RankPool
) -> None:
    models = (folders["student-tied"], folders["teacher-untied"])
    trajectories = uneven_trajectories()
    counts = [
        ranks.run(score_and_update, layout, *models, trajectories, world_size=1)[0][-1]
        for layout in (replace(ONE_PROCESS, micro_batch_size=1), ROWS[0])
    ]
    assert counts == [7, 3]
    assert fixed_labels(trajectories).mask_BT.sum() == 120
