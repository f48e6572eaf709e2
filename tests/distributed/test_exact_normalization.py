"""Means of the loss over the whole vocabulary train, and are told, as in plain fp64 torch."""

from dataclasses import replace

import pytest
from comparison import error, largest_error
from layout_rows import ONE_PROCESS, parallel, row
from plain_training import update_in_plain_torch
from support.rank_pool import RankPool
from support.vocabulary_cases import ALPHA
from training import Measured, Row, update_on_ranks

from poweropd_megatron.config.objective import ObjectiveConfig

TOLERANCE = 1e-5
SEQUENCES = ObjectiveConfig(kind="reverse_kl", loss_normalization="sequence_mean")
MICRO_BATCHES = ObjectiveConfig(
    kind="power_exact", alpha=ALPHA, loss_normalization="micro_batch_mean"
)
CASES = {
    "sequences": (SEQUENCES, None),
    "micro-batches": (MICRO_BATCHES, None),
    "sequences in a window": (replace(SEQUENCES, window_first_percent=60.0), None),
    "sequences of mini-batches": (SEQUENCES, 3),
    "micro-batches of mini-batches": (MICRO_BATCHES, 3),
}
"""Objectives, and how many of the five sequences, one without tokens in the loss, a step takes."""
LAYOUTS = [
    ONE_PROCESS,
    row("TP2+SP", 2, parallel(2, sequence=True)),
    row("DP2", 2, parallel(), micro_batch_size=1),
]
"""At DP 2 micro-batches of one sequence are the same as in one process."""


def update_in_case(case: str, layout: Row, *folders: str) -> Measured:
    """Return what this rank saw of a case's updates."""
    objective, mini_batch_size = CASES[case]
    changed = replace(layout, objective=objective, mini_batch_size=mini_batch_size)
    return update_on_ranks(changed, *folders)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_each_mean_trains_like_plain_torch(
    layout: Row, case: str, folders: dict[str, str], ranks: RankPool
) -> None:
    models = folders["student-tied"], folders["teacher-same-tokens"]
    objective, mini_batch_size = CASES[case]
    reference = update_in_plain_torch(
        *models,
        objective,
        mini_batch_size=mini_batch_size,
        micro_batch_size=layout.micro_batch_size,
    )
    by_rank = ranks.run(update_in_case, case, layout, *models, world_size=layout.world_size)
    for quantity in ("logp_UBT", "loss_U", "grad_norm_U"):
        for found in by_rank:
            difference = error(getattr(found, quantity), getattr(reference, quantity))
            assert difference <= TOLERANCE, quantity
    for quantity in ("gradients", "weights"):
        worst, name = largest_error(getattr(by_rank[0], quantity), getattr(reference, quantity))
        assert worst <= TOLERANCE, (quantity, name)
