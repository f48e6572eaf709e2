"""NaN and infinity never reach the weights, and every rank decides alike."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist
from small_run import build, differences, state_of, train_and_save
from torch import Tensor

from poweropd_megatron.errors import NonFiniteError
from poweropd_megatron.objectives.labels import Labels
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.teacher import OwnScores


def train_with_a_bad_teacher(folder: str, kind: str, value: float, tp: int) -> None:
    """Fail unless bad log-probs on the last rank end the second step on this rank, its state
    untouched.
    """
    run = build(Path(folder), f"--objective.kind={kind}", steps=1, tp=tp)
    train_and_save(run, first_step=1)
    before = state_of(run)
    score_own, shared = run.teacher.score_own, run.teacher.shared
    scored: list[Labels] = []

    def score_and_remember(trajectories: Trajectories, labels: Labels) -> OwnScores:
        scored.append(labels)
        return score_own(trajectories, labels)

    def share_badly(parts: Sequence[OwnScores]) -> Tensor:
        logp_BT = shared(parts)
        if dist.get_rank() == dist.get_world_size() - 1:
            first_B = scored[-1].mask_BT.int().argmax(dim=1)
            logp_BT[range(len(first_B)), first_B] = value
        return logp_BT

    run.teacher.score_own, run.teacher.shared = score_and_remember, share_badly
    longer = dataclasses.replace(run, config=dataclasses.replace(run.config, train_steps=2))
    with pytest.raises(NonFiniteError, match="the weights were not changed"):
        train_and_save(longer, first_step=2)
    after = state_of(run)
    assert differences(before, after) == ["prompts"]
    assert all(value.isfinite().all() for value in after.values() if isinstance(value, Tensor))
    assert run.checkpoints.steps() == [1]


@pytest.mark.parametrize(
    ("kind", "value", "world_size", "tp"),
    [
        ("power", math.nan, 1, 1),
        ("power", math.inf, 1, 1),
        ("log_ratio", -math.inf, 1, 1),
        ("power", math.nan, 2, 1),
        ("power", math.nan, 2, 2),
    ],
)
def test_bad_log_probs_of_the_teacher_on_one_rank_end_the_step_on_all_with_the_weights_as_they_were(
    kind, value, world_size, tp, tmp_path, call_on_ranks
):
    arguments = (str(tmp_path), kind, value, tp)
    codes = call_on_ranks(train_with_a_bad_teacher, *arguments, world_size=world_size)
    assert codes == [0] * world_size
