"""The metrics of a step that depend on what was drawn and what was scored."""

import pytest
import torch
from support import made_trajectories

from poweropd_megatron.objectives.labels import label
from poweropd_megatron.objectives.sampled.log_ratio import log_ratio_reward
from poweropd_megatron.train.step_metrics import speed_metrics, step_metrics
from poweropd_megatron.train.student_outcome import StudentOutcome

EOS, TEACHER_EOS = 1, 0


@pytest.mark.parametrize("terminal", ["raw", "mask", "cross_eos", "im_end"])
def test_the_log_prob_gap_is_of_the_tokens_that_were_drawn(terminal):
    trajectories = made_trajectories.make([([5], [7, 8, EOS]), ([5, 6], [9, 9])], eos=EOS)
    labels = label(trajectories, terminal, teacher_eos_id=TEACHER_EOS)
    logp_BT = torch.zeros(trajectories.token_ids_BT.shape)
    logp_BT[0, 1] = -0.25
    logp_BT[0, 3] = -20.0 if terminal == "im_end" else -0.125
    outcome = StudentOutcome(
        logp_BT=logp_BT,
        teacher_logp_BT=logp_BT,
        entropy_BT=torch.zeros_like(logp_BT),
        grad_norm=1.0,
        learning_rate=1.0,
        reward=log_ratio_reward,
    )
    metrics = step_metrics(trajectories, labels, logp_BT, outcome, ratio=None)
    assert metrics["rollout/logp_gap"] == 0.25
    assert metrics["num_tokens"] == (4 if terminal == "mask" else 5)


def test_the_rate_counts_prompts_and_responses_through_the_three_phases():
    trajectories = made_trajectories.make([([5], [7, 8, EOS]), ([5, 6], [9, 9])], eos=EOS)
    seconds = {f"time/{phase}_seconds": 2.0 for phase in ("rollout", "teacher", "student", "eval")}
    assert speed_metrics(seconds, trajectories)["tokens_per_second"] == 8 / 6


@pytest.mark.parametrize("terminal", ["raw", "mask", "cross_eos", "im_end"])
def test_the_reward_of_endings_is_of_those_in_the_loss_and_the_norm_is_by_the_rewards_scale(
    terminal,
):
    sequences = [([5], [7, 8, EOS]), ([5, 6], [9, EOS]), ([5], [9, 9, 9])]
    trajectories = made_trajectories.make(sequences, eos=EOS)
    labels = label(trajectories, terminal, teacher_eos_id=TEACHER_EOS)
    generator = torch.Generator().manual_seed(0)
    teacher_BT, student_BT = -torch.rand(2, *labels.mask_BT.shape, generator=generator)
    outcome = StudentOutcome(
        logp_BT=student_BT,
        teacher_logp_BT=student_BT,
        entropy_BT=student_BT,
        grad_norm=3.0,
        learning_rate=1.0,
        reward=log_ratio_reward,
    )
    metrics = step_metrics(trajectories, labels, teacher_BT, outcome, ratio=None)
    reward = (teacher_BT - student_BT).double()
    if terminal == "mask":
        assert "reward/terminal_mean" not in metrics
    else:
        expected = (reward[0, 3] + reward[1, 3]).item() / 2
        assert metrics["reward/terminal_mean"] == pytest.approx(expected, abs=1e-6)
    scale = reward[labels.mask_BT].square().mean().sqrt().item()
    assert metrics["grad_norm_per_reward"] == pytest.approx(3.0 / scale, rel=1e-5)


def test_without_rewards_the_norm_by_their_scale_is_0():
    trajectories = made_trajectories.make([([5], [7, 8, EOS])], eos=EOS)
    labels = label(trajectories, "raw", teacher_eos_id=TEACHER_EOS)
    logp_BT = torch.zeros(labels.mask_BT.shape)
    outcome = StudentOutcome(
        logp_BT=logp_BT,
        teacher_logp_BT=logp_BT,
        entropy_BT=logp_BT,
        grad_norm=0.0,
        learning_rate=1.0,
        reward=log_ratio_reward,
    )
    metrics = step_metrics(trajectories, labels, logp_BT, outcome, ratio=None)
    assert metrics["grad_norm_per_reward"] == 0.0


def test_the_loss_over_the_whole_vocabulary_has_the_weights_of_its_tokens():
    trajectories = made_trajectories.make([([5], [7, 8, EOS]), ([5, 6], [9, 9])], eos=EOS)
    labels = label(trajectories, "raw", teacher_eos_id=TEACHER_EOS)
    loss_BT, weight_BT, full_kl_BT = torch.rand(3, *labels.mask_BT.shape).double()
    zeros_BT = torch.zeros(labels.mask_BT.shape)
    outcome = StudentOutcome(
        logp_BT=zeros_BT,
        teacher_logp_BT=zeros_BT,
        entropy_BT=zeros_BT,
        grad_norm=0.0,
        learning_rate=1.0,
        reward=log_ratio_reward,
        weight_BT=weight_BT,
        loss_BT=loss_BT,
        full_kl_BT=full_kl_BT,
    )
    metrics = step_metrics(trajectories, labels, zeros_BT, outcome, ratio=None)
    tokens = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    expected = sum(float(loss_BT[token] * weight_BT[token]) for token in tokens) / 5
    assert metrics["loss"] == pytest.approx(expected)
    mean_kl = sum(float(full_kl_BT[token]) for token in tokens) / 5
    assert metrics["kl/full_vocabulary"] == pytest.approx(mean_kl)
