"""The metrics of a step that depend on what was drawn and what was scored."""

import pytest
import torch
from support import made_trajectories

from poweropd_megatron.objectives.labels import label
from poweropd_megatron.objectives.rewards import log_ratio_reward
from poweropd_megatron.train.step_metrics import speed_metrics, step_metrics
from poweropd_megatron.train.student import StudentOutcome

EOS, TEACHER_EOS = 1, 0


@pytest.mark.parametrize("terminal", ["raw", "mask", "cross_eos", "im_end"])
def test_the_log_prob_gap_is_of_the_tokens_that_were_drawn(terminal):
    trajectories = made_trajectories.make([([5], [7, 8, EOS]), ([5, 6], [9, 9])], eos=EOS)
    labels = label(trajectories, terminal, teacher_eos_id=TEACHER_EOS)
    logp_BT = torch.zeros(trajectories.token_ids_BT.shape)
    logp_BT[0, 1] = -0.25
    logp_BT[0, 3] = -20.0 if terminal == "im_end" else -0.125
    outcome = StudentOutcome(
        logp_BT=logp_BT, entropy_BT=torch.zeros_like(logp_BT), grad_norm=1.0, learning_rate=1.0
    )
    metrics = step_metrics(trajectories, labels, logp_BT, outcome, log_ratio_reward)
    assert metrics["rollout/logp_gap"] == 0.25
    assert metrics["num_tokens"] == (4 if terminal == "mask" else 5)


def test_the_rate_counts_prompts_and_responses_through_the_three_phases():
    trajectories = made_trajectories.make([([5], [7, 8, EOS]), ([5, 6], [9, 9])], eos=EOS)
    seconds = {f"time/{phase}_seconds": 2.0 for phase in ("rollout", "teacher", "student", "eval")}
    assert speed_metrics(seconds, trajectories)["tokens_per_second"] == 8 / 6
