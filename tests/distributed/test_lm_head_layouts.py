"""Every way to train the LM head gives the gradients of plain fp64 torch, in every kind of layout.

test_layouts.py has more layouts with the fused head, each micro-batch of them in one chunk; here
the head's tiles and chunks are three tokens, so that there are several of them, the last smaller.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from comparison import error, largest_error
from layout_rows import ONE_PROCESS, parallel, row
from megatron.core import parallel_state
from plain_training import update_in_plain_torch
from support.rank_pool import RankPool
from training import Measured, Row, update_on_ranks

from poweropd_megatron.ops import lm_head_tiles

TOLERANCE = 1e-5
"""Norm of the difference over norm of the reference."""
HEADS = ("fused", "recompute", "materialized")
CASES = [
    (ONE_PROCESS, "tied"),
    (ONE_PROCESS, "untied"),
    (row("TP2", 2, parallel(2)), "tied"),
    (row("TP2", 2, parallel(2)), "untied"),
    (row("TP2+SP", 2, parallel(2, sequence=True)), "tied"),
    (row("TP2+SP", 2, parallel(2, sequence=True)), "untied"),
    (row("PP2", 2, parallel(1, 2)), "tied"),
    (row("PP2", 2, parallel(1, 2)), "untied"),
    (row("DP2", 2, parallel()), "untied"),
    (row("TP2xPP2", 4, parallel(2, 2)), "tied"),
    (row("TP2xPP2+SP", 4, parallel(2, 2, sequence=True)), "tied"),
    (row("TP2xPP2+SP", 4, parallel(2, 2, sequence=True)), "untied"),
]
"""Layouts, and whether the embeddings are tied: then the head's gradient joins the embedding's."""


def update_with_each_head(heads: Sequence[str], row: Row, *folders: str) -> list[Measured]:
    """Return what this rank saw of the updates with each head, each from the same start."""
    lm_head_tiles.TILE_ROWS = {"cpu": 3}
    lm_head_tiles.CHUNK_BYTES = {"cpu": 3 * 4 * -(-37 // row.student.tensor_model_parallel_size)}
    measured = []
    for head in heads:
        measured.append(update_on_ranks(replace(row, head=head), *folders))
        parallel_state.destroy_model_parallel()
    return measured


@pytest.fixture(scope="module")
def references(folders: dict[str, str]) -> dict[str, Measured]:
    """Return what plain torch measured, with tied and with untied embeddings."""
    return {
        kind: update_in_plain_torch(folders[f"student-{kind}"], folders[f"teacher-{kind}"])
        for kind in ("tied", "untied")
    }


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Row, str]:
    """Return a layout, and whether the embeddings are tied."""
    layout, embeddings = request.param
    return layout, embeddings


@pytest.fixture(scope="module")
def measured(
    case: tuple[Row, str], folders: dict[str, str], ranks: RankPool
) -> dict[str, list[Measured]]:
    """Return what each rank of a layout measured with each head."""
    layout, embeddings = case
    by_rank = ranks.run(
        update_with_each_head,
        HEADS,
        layout,
        folders[f"student-{embeddings}"],
        folders[f"teacher-{embeddings}"],
        world_size=layout.world_size,
    )
    return dict(zip(HEADS, map(list, zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_each_head_trains_like_plain_torch(
    head: str,
    case: tuple[Row, str],
    measured: dict[str, list[Measured]],
    references: dict[str, Measured],
) -> None:
    found, reference = measured[head][0], references[case[1]]
    for quantity in ("logp_UBT", "entropy_UBT", "loss_U", "grad_norm_U"):
        assert error(getattr(found, quantity), getattr(reference, quantity)) <= TOLERANCE, quantity
    for quantity in ("gradients", "weights"):
        worst, name = largest_error(getattr(found, quantity), getattr(reference, quantity))
        assert worst <= TOLERANCE, name
    assert all((rows == 0).all() for rows in found.padding)


@pytest.mark.parametrize("head", HEADS)
def test_each_head_tells_every_rank_the_same(
    head: str, measured: dict[str, list[Measured]]
) -> None:
    first, *others = measured[head]
    for other in others:
        for quantity in ("logp_UBT", "entropy_UBT", "grad_norm_U"):
            assert torch.equal(getattr(other, quantity), getattr(first, quantity))
    for copies in (*first.gradients.values(), *first.weights.values()):
        assert all(torch.equal(copy, copies[0]) for copy in copies)
