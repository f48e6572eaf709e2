"""A Qwen3-MoE in every layout trains like plain fp64 torch, and like one process."""

import pytest
from comparison import error, largest_error
from layout_rows import ONE_PROCESS, parallel, row
from plain_training import update_in_plain_torch
from support.rank_pool import RankPool
from training import Measured, Row, update_on_ranks

TOLERANCE = 1e-4

ROWS = [
    row("one-process", 1, parallel()),
    row("EP2", 2, parallel(expert=2)),
    row("DP2", 2, parallel()),
    row("TP2+SP", 2, parallel(2, sequence=True)),
    row("TP2+SPxEP2", 2, parallel(2, expert=2, sequence=True)),
    row("PP2", 2, parallel(1, 2)),
]


def run(layout: Row, folders: dict[str, str], ranks: RankPool) -> list[Measured]:
    return ranks.run(
        update_on_ranks,
        layout,
        folders["student-experts"],
        folders["teacher-experts"],
        world_size=layout.world_size,
    )


@pytest.fixture(scope="module")
def references(folders: dict[str, str], ranks: RankPool) -> list[Measured]:
    return [
        update_in_plain_torch(folders["student-experts"], folders["teacher-experts"]),
        run(ONE_PROCESS, folders, ranks)[0],
    ]


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def by_rank(
    request: pytest.FixtureRequest, folders: dict[str, str], ranks: RankPool
) -> list[Measured]:
    return run(request.param, folders, ranks)


@pytest.mark.parametrize(
    "quantity", ["teacher_logp_BT", "logp_UBT", "entropy_UBT", "loss_U", "grad_norm_U"]
)
def test_layout_scores_like_plain_torch_and_like_one_process(
    quantity: str, by_rank: list[Measured], references: list[Measured]
) -> None:
    for reference in references:
        assert error(getattr(by_rank[0], quantity), getattr(reference, quantity)) <= TOLERANCE


@pytest.mark.parametrize("quantity", ["gradients", "weights"])
def test_layout_learns_like_plain_torch_and_like_one_process(
    quantity: str, by_rank: list[Measured], references: list[Measured]
) -> None:
    for reference in references:
        worst, name = largest_error(getattr(by_rank[0], quantity), getattr(reference, quantity))
        assert worst <= TOLERANCE, name
