"""Objectives over the whole vocabulary train as plain fp64 torch does, in every kind of layout."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from comparison import error, largest_error
from layout_rows import ONE_PROCESS, parallel, row
from plain_training import update_in_plain_torch
from support.rank_pool import RankPool
from support.vocabulary_cases import ALPHA, TOP_K
from training import Measured, Row, update_on_ranks

from poweropd_megatron.config.objective import ObjectiveConfig, ObjectiveKind
from poweropd_megatron.ops import lm_head_tiles

TOLERANCE = {"tied": 1e-5, "untied": 1e-5, "experts": 1e-4}
"""Norm of the difference over norm of the reference, by student."""
KINDS: tuple[ObjectiveKind, ...] = (
    "reverse_kl",
    "power_exact",
    "forward_kl",
    "topk_reverse_kl",
    "topk_forward_kl",
)
TWO = ("power_exact", "topk_reverse_kl")
CASES: list[tuple[Row, str, Sequence[ObjectiveKind]]] = [
    (ONE_PROCESS, "tied", KINDS),
    (row("TP2+SP", 2, parallel(2, sequence=True)), "tied", TWO),
    (
        row("DP2-packed, TP2 teacher", 2, parallel(), parallel(2), max_tokens_per_microbatch=20),
        "untied",
        TWO,
    ),
    (row("PP2, CP2 teacher", 2, parallel(1, 2), parallel(context=2)), "untied", TWO),
    (
        row("PP2xVPP2, offloaded", 2, parallel(1, 2, virtual=2), parallel(1, 2), offload=True),
        "tied",
        TWO,
    ),
    (row("CP2+1", 3, parallel(context=2), parallel(), teacher_ranks=1), "untied", TWO),
    (
        row(
            "PP2xVPP2xDP2+1-packed",
            5,
            parallel(1, 2, virtual=2),
            parallel(),
            max_tokens_per_microbatch=4096,
            teacher_ranks=1,
        ),
        "untied",
        TWO,
    ),
    (row("TP2xPP2, DP4 teacher", 4, parallel(2, 2), parallel()), "untied", KINDS),
    (row("EP2, TP2 teacher", 2, parallel(expert=2), parallel(2)), "experts", TWO),
    (
        row("EP2xTP2+SP", 4, parallel(2, expert=2, sequence=True), parallel(2)),
        "experts",
        ("power_exact",),
    ),
]
"""Layouts, the student (with embeddings tied or not, or tied and with experts), and the kinds."""


def update_with_kind(kind: ObjectiveKind, row: Row, *folders: str) -> Measured:
    """Return what this rank saw of the updates with a kind of objective, in small chunks."""
    row_bytes = 4 * -(-37 // row.student.tensor_model_parallel_size)
    lm_head_tiles.CHUNK_BYTES = {"cpu": 2 * 3 * row_bytes}
    objective = ObjectiveConfig(kind=kind, alpha=ALPHA, top_k=TOP_K)
    return update_on_ranks(replace(row, objective=objective), *folders)


@pytest.fixture(scope="module")
def references(folders: dict[str, str]) -> dict[tuple[str, ObjectiveKind], Measured]:
    """Return what plain torch measured, by student and kind."""
    return {
        (student, kind): update_in_plain_torch(
            folders[f"student-{student}"],
            folders["teacher-same-tokens"],
            ObjectiveConfig(kind=kind),
        )
        for student in TOLERANCE
        for kind in KINDS
        if student != "experts" or kind in TWO
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def test_each_kind_trains_like_plain_torch(
    case: tuple[Row, str, Sequence[ObjectiveKind]],
    folders: dict[str, str],
    ranks: RankPool,
    references: dict[tuple[str, ObjectiveKind], Measured],
) -> None:
    layout, student, kinds = case
    tolerance = TOLERANCE[student]
    for kind in kinds:
        found, *others = ranks.run(
            update_with_kind,
            kind,
            layout,
            folders[f"student-{student}"],
            folders["teacher-same-tokens"],
            world_size=layout.world_size,
        )
        reference = references[student, kind]
        for quantity in (*("teacher_logp_BT", "logp_UBT", "entropy_UBT", "loss_U", "grad_norm_U"),):
            difference = error(getattr(found, quantity), getattr(reference, quantity))
            assert difference <= tolerance, (kind, quantity)
            for other in others:
                assert torch.equal(getattr(other, quantity), getattr(found, quantity)), kind
        for quantity in ("gradients", "weights"):
            worst, name = largest_error(getattr(found, quantity), getattr(reference, quantity))
            assert worst <= tolerance, (kind, name)
        assert all((rows == 0).all() for rows in found.padding)
