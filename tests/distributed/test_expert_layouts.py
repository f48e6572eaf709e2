"""A Qwen3-MoE in every layout trains like plain fp64 torch, and like one process."""

import pytest
import torch
from comparison import copies, error, largest_error
from layout_rows import ONE_PROCESS, parallel, row
from plain_training import update_in_plain_torch
from support.rank_pool import RankPool
from training import OPTIMIZER, Measured, Row, update_on_ranks

TOLERANCE = 1e-5
"""Norm of the difference over norm of the reference, as for dense models."""
BOTH = ("experts", "experts")
"""Kinds of student and teacher."""
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}

CASES = [
    (ONE_PROCESS, BOTH),
    (row("EP2", 2, parallel(expert=2)), BOTH),
    (row("DP2", 2, parallel()), BOTH),
    (row("PP2", 2, parallel(1, 2)), BOTH),
    (row("TP2+SP", 2, parallel(2, sequence=True)), BOTH),
    (row("TP2+SPxEP2", 2, parallel(2, expert=2, sequence=True)), BOTH),
    (row("TP4+SP", 4, parallel(4, sequence=True)), BOTH),
    (row("EP4", 4, parallel(expert=4)), BOTH),
    (row("EP2xDP2", 4, parallel(expert=2)), BOTH),
    (row("EP2xPP2", 4, parallel(1, 2, expert=2)), BOTH),
    (row("TP2+SPxEP4", 4, parallel(2, expert=4, sequence=True)), BOTH),
    (row("EP2-plain-optimizer", 2, parallel(expert=2), use_distributed_optimizer=False), BOTH),
    (row("EP2xCP2", 2, parallel(expert=2, context=2)), BOTH),
    (row("EP4xCP2xTP2+SP", 4, parallel(2, expert=4, context=2, sequence=True)), BOTH),
    (row("EP4xCP2-packed", 4, parallel(expert=4, context=2), max_tokens_per_microbatch=20), BOTH),
    (row("EP4-micro-batch-1", 4, parallel(expert=4), micro_batch_size=1), BOTH),
    (row("EP4-packed", 4, parallel(expert=4), max_tokens_per_microbatch=20), BOTH),
    (
        row(
            "TP2+SPxEP4-packed",
            4,
            parallel(2, expert=4, sequence=True),
            max_tokens_per_microbatch=20,
        ),
        BOTH,
    ),
    (
        row("EP2xPP2-packed", 4, parallel(1, 2, expert=2), max_tokens_per_microbatch=10),
        BOTH,
    ),
    (row("PP2xVPP2", 2, parallel(1, 2, virtual=2), parallel(1, 2)), BOTH),
    (row("EP2xPP2xVPP2", 4, parallel(1, 2, virtual=2, expert=2), parallel(expert=2)), BOTH),
    (
        row(
            "EP2xDP2-overlapped",
            4,
            parallel(expert=2),
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            bucket_size=1000,
        ),
        BOTH,
    ),
    (row("EP2-recompute-full", 2, parallel(expert=2), **RECOMPUTED), BOTH),
    (
        row(
            "TP2+SPxEP2-recompute-moe",
            2,
            parallel(2, expert=2, sequence=True),
            recompute_granularity="selective",
            recompute_modules=["moe"],
        ),
        BOTH,
    ),
    (
        row("student-TP2-teacher-EP2", 2, parallel(2), parallel(expert=2)),
        ("tied", "experts"),
    ),
    (
        row(
            "student-DP2-teacher-TP2+SPxEP2",
            2,
            parallel(),
            parallel(2, expert=2, sequence=True),
        ),
        ("tied", "experts"),
    ),
    (
        row("student-EP2-teacher-TP2", 2, parallel(expert=2), parallel(2)),
        ("experts", "tied"),
    ),
    (
        row("student-PP2-teacher-EP2xPP2", 4, parallel(1, 2), parallel(1, 2, expert=2)),
        ("tied", "experts"),
    ),
    (row("disjoint-EP2", 4, parallel(expert=2), teacher_ranks=2), BOTH),
    (row("EP2-weights-below-1", 2, parallel(expert=2)), ("loose", "loose")),
]


def run(
    layout: Row, kinds: tuple[str, str], folders: dict[str, str], ranks: RankPool
) -> list[Measured]:
    student, teacher = kinds
    return ranks.run(
        update_on_ranks,
        layout,
        folders[f"student-{student}"],
        folders[f"teacher-{teacher}"],
        world_size=layout.world_size,
    )


@pytest.fixture(scope="module")
def references(folders: dict[str, str], ranks: RankPool) -> dict[tuple[str, str], list[Measured]]:
    """Return what plain torch and one process measured, by the kinds of models."""
    return {
        kinds: [
            update_in_plain_torch(folders[f"student-{kinds[0]}"], folders[f"teacher-{kinds[1]}"]),
            run(ONE_PROCESS, kinds, folders, ranks)[0],
        ]
        for kinds in {kinds for _, kinds in CASES}
    }


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0].name)
def case(request: pytest.FixtureRequest) -> tuple[Row, tuple[str, str]]:
    """Return a layout and the kinds of models."""
    layout, kinds = request.param
    return layout, kinds


@pytest.fixture(scope="module")
def by_rank(
    case: tuple[Row, tuple[str, str]], folders: dict[str, str], ranks: RankPool
) -> list[Measured]:
    """Return what each rank of a layout measured."""
    return run(*case, folders, ranks)


@pytest.fixture(scope="module")
def expected(
    case: tuple[Row, tuple[str, str]], references: dict[tuple[str, str], list[Measured]]
) -> list[Measured]:
    return references[case[1]]


@pytest.mark.parametrize(
    "quantity", ["teacher_logp_BT", "logp_UBT", "entropy_UBT", "loss_U", "grad_norm_U"]
)
def test_layout_scores_like_plain_torch_and_like_one_process(
    quantity: str, by_rank: list[Measured], expected: list[Measured]
) -> None:
    for reference in expected:
        assert error(getattr(by_rank[0], quantity), getattr(reference, quantity)) <= TOLERANCE


@pytest.mark.parametrize("quantity", ["gradients", "weights"])
def test_layout_learns_like_plain_torch_and_like_one_process(
    quantity: str, by_rank: list[Measured], expected: list[Measured]
) -> None:
    for reference in expected:
        worst, name = largest_error(getattr(by_rank[0], quantity), getattr(reference, quantity))
        assert worst <= TOLERANCE, name


def test_layout_tells_every_rank_the_same(by_rank: list[Measured]) -> None:
    for quantity in ("teacher_logp_BT", "logp_UBT", "entropy_UBT", "grad_norm_U"):
        values = [getattr(measured, quantity) for measured in by_rank]
        assert all(torch.equal(value, values[0]) for value in values)


def test_layout_keeps_copies_of_a_tensor_equal(by_rank: list[Measured]) -> None:
    """Copies: of routers and norms on tensor ranks, of experts on expert-data ranks."""
    assert all(torch.equal(copy, first) for _, copy, first in copies(by_rank[0]))


def test_the_fixed_batch_reaches_what_is_special(
    references: dict[tuple[str, str], list[Measured]],
) -> None:
    measured, _ = references[BOTH]
    assert measured.grad_norm_U.min() > OPTIMIZER.clip_grad, "clipped gradients"
    experts = [name for name in measured.gradients if ".experts." in name]
    assert len(experts) == 4 * 4 * 3
    assert all(measured.gradients[name][0].norm() > 0 for name in experts), "each has tokens"
