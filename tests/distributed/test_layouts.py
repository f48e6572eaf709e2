"""Every parallel layout trains like plain fp64 torch: log-probs, loss, gradients, weights.

Models are dense (dense_rows.py) or have experts (expert_rows.py). A row's test tells all that is
wrong with it.
"""

from collections.abc import Callable
from functools import cache

import dense_rows
import expert_rows
import pytest
from comparison import differences, inner_faults
from layout_rows import ONE_PROCESS, Case
from plain_training import update_in_plain_torch
from support.rank_pool import RankPool
from training import (
    OPTIMIZER,
    TEACHER_EOS,
    Measured,
    fixed_labels,
    fixed_trajectories,
    update_on_ranks,
)

TOLERANCE = 1e-5
"""Norm of the difference over norm of the reference; fp32 rounding comes to 3e-6 here."""
CASES = dense_rows.CASES + expert_rows.CASES

References = Callable[[str, str], dict[str, Measured]]


@pytest.fixture(scope="module")
def references(folders: dict[str, str], ranks: RankPool) -> References:
    """Return what tells, by the kinds of models, what plain torch and one process measured."""

    @cache
    def measure(student: str, teacher: str) -> dict[str, Measured]:
        return {
            "plain torch": update_in_plain_torch(
                folders[f"student-{student}"], folders[f"teacher-{teacher}"]
            ),
            "one process": run(Case(ONE_PROCESS, student, teacher), folders, ranks)[0],
        }

    return measure


def run(case: Case, folders: dict[str, str], ranks: RankPool) -> list[Measured]:
    """Return what each rank of a layout measured."""
    return ranks.run(
        update_on_ranks,
        case.row,
        folders[f"student-{case.student}"],
        folders[f"teacher-{case.teacher}"],
        world_size=case.row.world_size,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout(
    case: Case, references: References, folders: dict[str, str], ranks: RankPool
) -> None:
    """It scores and learns like both references; ranks agree; the vocabulary's padding stays 0.

    Copies of a tensor: replicated norms and routers, data-parallel ranks, experts on expert-data
    ranks, tied embeddings on the first and last stage.
    """
    by_rank = run(case, folders, ranks)
    faults = [
        fault
        for name, reference in references(case.student, case.teacher).items()
        for fault in differences(by_rank[0], reference, name, TOLERANCE)
    ]
    faults += inner_faults(by_rank)
    assert not faults, "\n".join(faults)


def test_the_fixed_batch_reaches_what_is_special_in_dense_models(references: References) -> None:
    labels = fixed_labels(fixed_trajectories())
    scored = labels.student_BT[labels.mask_BT]
    assert scored.min() == 0, "first column of the first shard"
    assert {18, 19} <= set(scored.tolist()), "columns on both sides of the cut at TP 2"
    assert scored.max() == 36, "last column before the padding"
    assert (labels.teacher_BT[labels.mask_BT] == TEACHER_EOS).any(), (
        "a token of the teacher's alone"
    )
    for kind in ("tied", "untied"):
        measured = references(kind, kind)["plain torch"]
        assert measured.grad_norm_U.min() > OPTIMIZER.clip_grad, "clipped gradients"


def test_the_fixed_batch_reaches_what_is_special_in_experts(references: References) -> None:
    measured = references("experts", "experts")["plain torch"]
    assert measured.grad_norm_U.min() > OPTIMIZER.clip_grad, "clipped gradients"
    experts = [name for name in measured.gradients if ".experts." in name]
    assert len(experts) == 4 * 4 * 3
    assert all(measured.gradients[name][0].norm() > 0 for name in experts), "each has tokens"
