"""Statistics of the batch, ratios, mini-batches and normalizations of the loss in layouts.

One process is compared with fp64 in unit/test_objective_gradients.py.
Shapes: B sequences, T tokens, U updates.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from comparison import error, largest_error
from layout_rows import ONE_PROCESS, parallel, row
from megatron.core import parallel_state
from support.rank_pool import RankPool
from torch import Tensor
from training import OPTIMIZER, Row, build_models, fixed_trajectories

from poweropd_megatron.config.schema import ObjectiveConfig
from poweropd_megatron.objectives.rewards import build_reward
from poweropd_megatron.ops import lm_head_tiles

TOLERANCE = 1e-5
MINI_BATCH = 3
"""Of five sequences: two optimizer steps, the second of two sequences."""
BEHAVIOUR_LOGP_B = torch.tensor([-6.2, -5.4, -4.8, -4.6, -5.2])
"""Of a sequence's tokens on average: some sequences are near to the student, others far."""
OBJECTIVES = {
    "statistics": ObjectiveConfig(
        kind="z_score",
        loss_normalization="sequence_mean",
        importance_ratio="token",
        window_first_percent=80.0,
    ),
    "sequence ratios": ObjectiveConfig(
        kind="log_ratio",
        reward_normalization="sign_max_abs",
        importance_ratio="sequence",
        ratio_low=0.2,
        ratio_high=5.0,
    ),
    "micro-batches": ObjectiveConfig(
        kind="power", alpha=1.0, loss_normalization="micro_batch_mean", importance_ratio="token"
    ),
}
ROWS = [
    row("TP2+SP", 2, parallel(2, sequence=True)),
    row("PP2", 2, parallel(1, 2)),
    row("DP2", 2, parallel()),
    row("CP2", 2, parallel(context=2)),
    row("DP2-packed", 2, parallel(), max_tokens_per_microbatch=20),
    row("PP2xVPP2", 2, parallel(1, 2, virtual=2), parallel(1, 2)),
    row("DP2-overlapped", 2, parallel(), overlap_grad_reduce=True, overlap_param_gather=True),
    row("TP2xDP2", 4, parallel(2)),
    row("disjoint-1+1", 2, parallel(), teacher_ranks=1),
]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What two updates came to; the weights under Hugging Face names."""

    logp_UBT: Tensor
    weight_UBT: Tensor
    grad_norm_U: Tensor
    weights: dict[str, list[Tensor]]


def update_with_each(layout: Row, *folders: str) -> dict[str, Learned]:
    """Return what this rank saw of updates with each objective, each from the same start."""
    lm_head_tiles.CHUNK_BYTES = {"cpu": 3 * 4 * 37}
    learned = {}
    for name, objective in OBJECTIVES.items():
        one_by_one = name == "micro-batches"
        packed = layout.max_tokens_per_microbatch is not None
        case = replace(
            layout,
            objective=objective,
            mini_batch_size=MINI_BATCH,
            micro_batch_size=1 if one_by_one else layout.micro_batch_size,
            max_tokens_per_microbatch=1
            if one_by_one and packed
            else layout.max_tokens_per_microbatch,
        )
        learned[name] = _update(case, *folders)
        parallel_state.destroy_model_parallel()
    return learned


def _update(case: Row, student: str, teacher: str) -> Learned:
    trajectories = fixed_trajectories()
    generator = torch.Generator().manual_seed(2)
    shape = trajectories.token_ids_BT.shape
    noise_BT = 0.4 * torch.randn(shape, generator=generator)
    trajectories.behaviour_logp_BT.copy_(BEHAVIOUR_LOGP_B[:, None] + noise_BT)
    teacher_logp_BT = -7 * torch.rand(shape, generator=generator)
    models = build_models(case, student, teacher, "fp32", OPTIMIZER, trajectories)
    reward = build_reward(case.objective)
    outcomes = [
        models.student.update(trajectories, models.labels, teacher_logp_BT, reward)
        for _ in range(2)
    ]
    models.student.finish_param_gather()
    weights = models.gather(lambda weight: weight)
    weights.pop("padding")
    return Learned(
        logp_UBT=torch.stack([outcome.logp_BT for outcome in outcomes]),
        weight_UBT=torch.stack([outcome.weight_BT for outcome in outcomes]),
        grad_norm_U=torch.tensor([outcome.grad_norm for outcome in outcomes]),
        weights=weights,
    )


@pytest.fixture(scope="module")
def expected(folders: dict[str, str], ranks: RankPool) -> dict[str, Learned]:
    return ranks.run(update_with_each, ONE_PROCESS, *_models(folders), world_size=1)[0]


def _models(folders: dict[str, str]) -> tuple[str, str]:
    return folders["student-tied"], folders["teacher-tied"]


@pytest.mark.parametrize("layout", ROWS, ids=lambda layout: layout.name)
def test_a_layout_learns_as_one_process_does(
    layout: Row, folders: dict[str, str], ranks: RankPool, expected: dict[str, Learned]
) -> None:
    by_rank = ranks.run(update_with_each, layout, *_models(folders), world_size=layout.world_size)
    for name, one in expected.items():
        for quantity in ("logp_UBT", "weight_UBT", "grad_norm_U"):
            for learned in by_rank:
                found = getattr(learned[name], quantity)
                assert error(found, getattr(one, quantity)) <= TOLERANCE, (name, quantity)
        worst, tensor = largest_error(by_rank[0][name].weights, one.weights)
        assert worst <= TOLERANCE, (name, tensor)


def test_the_updates_have_ratios_at_both_bounds_and_between(expected: dict[str, Learned]) -> None:
    weight_BT = expected["sequence ratios"].weight_UBT[0]
    assert weight_BT.min() == 0.2
    assert weight_BT.max() == 5.0
    assert ((weight_BT > 0.2) & (weight_BT < 5)).any()
    assert expected["statistics"].grad_norm_U.min() > OPTIMIZER.clip_grad
