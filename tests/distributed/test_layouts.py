"""Every parallel layout trains like plain fp64 torch: log-probs, loss, gradients, weights."""

from typing import Any

import pytest
import torch
from comparison import copies, error, largest_error
from layout_rows import ONE_PROCESS, parallel, row
from plain_training import update_in_plain_torch
from support.rank_pool import RankPool
from training import (
    OPTIMIZER,
    TEACHER_EOS,
    Measured,
    Row,
    fixed_labels,
    fixed_trajectories,
    update_on_ranks,
)

TOLERANCE = 1e-5
"""Norm of the difference over norm of the reference; fp32 rounding comes to 3e-6 here."""

OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
DEALLOCATED = {"deallocate_pipeline_outputs": True}
COUNTED = {
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
}


def recompute(granularity: str, method: str, num_layers: int) -> dict[str, Any]:
    return {
        "recompute_granularity": granularity,
        "recompute_method": method,
        "recompute_num_layers": num_layers,
    }


ROWS = [
    ONE_PROCESS,
    row("TP2", 2, parallel(2)),
    row("TP4", 4, parallel(4)),
    row("PP2", 2, parallel(1, 2)),
    row("PP4", 4, parallel(1, 4), parallel(1, 2)),
    row("DP2", 2, parallel()),
    row("TP2+SP", 2, parallel(2, sequence=True)),
    row("TP2xPP2", 4, parallel(2, 2)),
    row("TP2xDP2", 4, parallel(2)),
    row("PP2xDP2", 4, parallel(1, 2)),
    row("TP2xPP2+SP", 4, parallel(2, 2, sequence=True)),
    row("student-TP2-teacher-PP2", 2, parallel(2), parallel(1, 2)),
    row("student-PP2-teacher-TP2", 2, parallel(1, 2), parallel(2)),
    row("student-PP4-teacher-TP2xDP2", 4, parallel(1, 4), parallel(2)),
    row("CP2", 2, parallel(context=2)),
    row("CP2xTP2", 4, parallel(2, context=2)),
    row("PP2xVPP2", 2, parallel(1, 2, virtual=2), parallel(1, 2)),
    row("PP3-embedding-and-loss-counted", 3, parallel(1, 3), parallel(), **COUNTED),
    row(
        "PP2xVPP2xDP2-overlapped",
        4,
        parallel(1, 2, virtual=2),
        parallel(2, 2),
        micro_batch_size=1,
        **OVERLAPPED,
    ),
    row("disjoint-student-TP2-teacher-PP2", 4, parallel(2), parallel(1, 2), teacher_ranks=2),
]
ROWS_UNTIED_ONLY = [
    row("TP4+SP-packed", 4, parallel(4, sequence=True), max_tokens_per_microbatch=20),
    row("CP4", 4, parallel(context=4)),
    row("CP2xTP2+SP", 4, parallel(2, context=2, sequence=True)),
    row("CP2xPP2", 4, parallel(1, 2, context=2)),
    row("CP2xDP2", 4, parallel(context=2), micro_batch_size=1),
    row("CP2xPP2xVPP2", 4, parallel(1, 2, virtual=2, context=2), parallel(1, 2)),
    row("student-TP2-teacher-CP2", 2, parallel(2), parallel(context=2)),
    row("student-DP4-teacher-CP2xPP2", 4, parallel(), parallel(1, 2, context=2)),
    row("CP2-recompute-full", 2, parallel(context=2), **recompute("full", "uniform", 2)),
    row("CP2xDP2-overlapped", 4, parallel(context=2), bucket_size=9000, **OVERLAPPED),
    row("CP2-packed", 2, parallel(context=2), max_tokens_per_microbatch=20),
    row("CP4-packed", 4, parallel(context=4), max_tokens_per_microbatch=40),
    row(
        "CP2xTP2+SP-packed", 4, parallel(2, context=2, sequence=True), max_tokens_per_microbatch=20
    ),
    row("student-DP2-teacher-TP2", 2, parallel(), parallel(2)),
    row("TP2xPP2xVPP2+SP", 4, parallel(2, 2, virtual=2, sequence=True), parallel(2, 2)),
    row("PP2-1-and-3-layers", 2, parallel(1, 2), num_layers_in_first_pipeline_stage=1),
    row("PP2xVPP2-deallocated", 2, parallel(1, 2, virtual=2), parallel(), **DEALLOCATED),
    row("TP2xPP2-deallocated", 4, parallel(2, 2), **DEALLOCATED),
    row("DP2-overlapped", 2, parallel(), bucket_size=9000, **OVERLAPPED),
    row("DP2-overlap-grad-reduce", 2, parallel(), overlap_grad_reduce=True, bucket_size=20000),
    row("recompute-full", 1, parallel(), **recompute("full", "uniform", 2)),
    row("recompute-selective", 1, parallel(), recompute_granularity="selective"),
    row(
        "TP2+SP-recompute-mlp",
        2,
        parallel(2, sequence=True),
        recompute_granularity="selective",
        recompute_modules=["core_attn", "mlp"],
    ),
    row(
        "TP2xPP2-recompute-block",
        4,
        parallel(2, 2),
        **recompute("full", "block", 1),
        distribute_saved_activations=True,
    ),
    row(
        "PP2xVPP2-groups-of-3",
        2,
        parallel(1, 2, virtual=2),
        parallel(1, 2),
        micro_batch_size=1,
        microbatch_group_size_per_vp_stage=3,
        **recompute("full", "uniform", 1),
    ),
    row("DP2-plain-optimizer", 2, parallel(), use_distributed_optimizer=False),
    row("PP2-micro-batch-1", 2, parallel(1, 2), micro_batch_size=1),
    row("PP2-micro-batch-4", 2, parallel(1, 2), micro_batch_size=4),
    row("DP2-micro-batch-1", 2, parallel(), micro_batch_size=1),
    row("DP2-micro-batch-4", 2, parallel(), micro_batch_size=4),
    row("packed", 1, parallel(), max_tokens_per_microbatch=20),
    row("packed-into-one", 1, parallel(), max_tokens_per_microbatch=1000),
    row("packed-one-by-one", 1, parallel(), max_tokens_per_microbatch=1),
    row("DP2-packed", 2, parallel(), max_tokens_per_microbatch=20),
    row("DP2-packed-one-by-one", 2, parallel(), max_tokens_per_microbatch=1),
    row("TP2-packed", 2, parallel(2), max_tokens_per_microbatch=20),
    row("TP2+SP-packed", 2, parallel(2, sequence=True), max_tokens_per_microbatch=20),
    row("PP2-packed", 2, parallel(1, 2), max_tokens_per_microbatch=20),
    row("TP2xPP2+SP-packed", 4, parallel(2, 2, sequence=True), max_tokens_per_microbatch=20),
    row(
        "PP2xVPP2-packed",
        2,
        parallel(1, 2, virtual=2),
        parallel(1, 2),
        max_tokens_per_microbatch=10,
    ),
    row(
        "PP2xVPP2xDP2-packed",
        4,
        parallel(1, 2, virtual=2),
        parallel(1, 2),
        max_tokens_per_microbatch=20,
    ),
    row(
        "TP2+SP-packed-recompute-full",
        2,
        parallel(2, sequence=True),
        max_tokens_per_microbatch=20,
        **recompute("full", "uniform", 2),
    ),
    row(
        "packed-recompute-attention",
        1,
        parallel(),
        max_tokens_per_microbatch=20,
        recompute_granularity="selective",
        recompute_modules=["core_attn"],
    ),
    row(
        "student-PP2xDP2-teacher-TP2xDP2+SP-packed",
        4,
        parallel(1, 2),
        parallel(2, sequence=True),
        max_tokens_per_microbatch=10,
    ),
    row("disjoint-1+1", 2, parallel(), teacher_ranks=1),
    row("disjoint-2+1-student-TP2", 3, parallel(2), parallel(), teacher_ranks=1),
    row("disjoint-student-DP2-teacher-TP2", 4, parallel(), parallel(2), teacher_ranks=2),
    row("disjoint-CP2", 4, parallel(context=2), teacher_ranks=2),
    row("disjoint-student-PP2-teacher-DP2", 4, parallel(1, 2), parallel(), teacher_ranks=2),
    row(
        "disjoint-student-PP2xVPP2-teacher-CP2-packed",
        4,
        parallel(1, 2, virtual=2),
        parallel(context=2),
        max_tokens_per_microbatch=20,
        teacher_ranks=2,
    ),
    row("disjoint-student-CP2", 3, parallel(context=2), parallel(), teacher_ranks=1),
    row("TP2-teacher-offloaded", 2, parallel(2), offload=True),
]
CASES = [(row, "tied") for row in ROWS] + [(row, "untied") for row in ROWS + ROWS_UNTIED_ONLY]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Row, str]:
    """Return a layout, and whether the embeddings are tied."""
    layout, embeddings = request.param
    return layout, embeddings


@pytest.fixture(scope="module")
def references(folders: dict[str, str], ranks: RankPool) -> dict[str, list[Measured]]:
    """Return what plain torch and one process measured, with tied and with untied embeddings."""
    return {
        kind: [
            update_in_plain_torch(folders[f"student-{kind}"], folders[f"teacher-{kind}"]),
            run(ONE_PROCESS, kind, folders, ranks)[0],
        ]
        for kind in ("tied", "untied")
    }


@pytest.fixture(scope="module")
def expected(case: tuple[Row, str], references: dict[str, list[Measured]]) -> list[Measured]:
    return references[case[1]]


@pytest.fixture(scope="module")
def by_rank(case: tuple[Row, str], folders: dict[str, str], ranks: RankPool) -> list[Measured]:
    """Return what each rank of a layout measured."""
    return run(*case, folders, ranks)


@pytest.fixture(scope="module")
def measured(by_rank: list[Measured]) -> Measured:
    return by_rank[0]


def run(layout: Row, embeddings: str, folders: dict[str, str], ranks: RankPool) -> list[Measured]:
    return ranks.run(
        update_on_ranks,
        layout,
        folders[f"student-{embeddings}"],
        folders[f"teacher-{embeddings}"],
        world_size=layout.world_size,
    )


@pytest.mark.parametrize(
    "quantity", ["teacher_logp_BT", "logp_UBT", "entropy_UBT", "loss_U", "grad_norm_U"]
)
def test_layout_scores_like_plain_torch_and_like_one_process(
    quantity: str, measured: Measured, expected: list[Measured]
) -> None:
    for reference in expected:
        assert error(getattr(measured, quantity), getattr(reference, quantity)) <= TOLERANCE


@pytest.mark.parametrize("quantity", ["gradients", "weights"])
def test_layout_learns_like_plain_torch_and_like_one_process(
    quantity: str, measured: Measured, expected: list[Measured]
) -> None:
    for reference in expected:
        worst, name = largest_error(getattr(measured, quantity), getattr(reference, quantity))
        assert worst <= TOLERANCE, name


def test_layout_tells_every_rank_the_same(by_rank: list[Measured]) -> None:
    for quantity in ("teacher_logp_BT", "logp_UBT", "entropy_UBT", "grad_norm_U"):
        values = [getattr(measured, quantity) for measured in by_rank]
        assert all(torch.equal(value, values[0]) for value in values)


def test_layout_keeps_copies_of_a_tensor_equal(measured: Measured) -> None:
    """Copies: replicated norms, data-parallel ranks, tied embeddings on first and last stage."""
    assert all(torch.equal(copy, first) for _, copy, first in copies(measured))


def test_layout_leaves_padding_of_the_vocabulary_at_zero(measured: Measured) -> None:
    assert all((rows == 0).all() for rows in measured.padding)


def test_the_fixed_batch_reaches_what_is_special(references: dict[str, list[Measured]]) -> None:
    labels = fixed_labels(fixed_trajectories())
    scored = labels.student_BT[labels.mask_BT]
    assert scored.min() == 0, "first column of the first shard"
    assert {18, 19} <= set(scored.tolist()), "columns on both sides of the cut at TP 2"
    assert scored.max() == 36, "last column before the padding"
    assert (labels.teacher_BT[labels.mask_BT] == TEACHER_EOS).any(), (
        "a token of the teacher's alone"
    )
    for measured, _ in references.values():
        assert measured.grad_norm_U.min() > OPTIMIZER.clip_grad, "clipped gradients"
