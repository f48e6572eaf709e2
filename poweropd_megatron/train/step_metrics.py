"""The metrics of one step, from what every rank holds after it.

Shapes: B sequences, T tokens, N tokens in the loss.
"""

import math
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from poweropd_megatron.objectives.diagnostics import (
    reward_by_position,
    reward_histogram,
    reward_map,
    reward_metrics,
    reward_surface,
)
from poweropd_megatron.objectives.importance import (
    ImportanceRatio,
    importance_metrics,
    log_ratios,
)
from poweropd_megatron.objectives.labels import Labels, drawn
from poweropd_megatron.objectives.loss import policy_gradient_loss
from poweropd_megatron.rollout.trajectories import FINISH_STOP, Trajectories
from poweropd_megatron.train.batching import Batching
from poweropd_megatron.train.clock import TRAINING_PHASES
from poweropd_megatron.train.student_outcome import StudentOutcome


def step_metrics(
    trajectories: Trajectories,
    labels: Labels,
    teacher_logp_BT: Tensor,
    outcome: StudentOutcome,
    *,
    ratio: ImportanceRatio | None,
) -> dict[str, float]:
    """Return the metrics of a step, but for its times, under the names of metrics.jsonl.

    With an objective over the whole vocabulary, loss is its own, the rewards are of drawn tokens
    for comparison, and kl/full_vocabulary is the mean KL(student || teacher) in nats a token.
    reward/terminal_mean, of the EOS that ended responses, is left out where none is in the loss.
    rollout/logp_gap is the largest |log p_S - log p_behaviour|, rollout/logp_difference their mean:
    rounding, unless the sampling distribution isn't the one that is scored (temperature, top-p,
    top-k), which rollout/truncated_mass quantifies, or the student has learned since. With an
    importance ratio, see importance_metrics.
    """
    mask_BT = labels.mask_BT
    teacher_logp_N, student_logp_N = teacher_logp_BT[mask_BT], outcome.logp_BT[mask_BT]
    reward_N = outcome.reward(teacher_logp_N, student_logp_N)
    weight_N = 1.0 if outcome.weight_BT is None else outcome.weight_BT[mask_BT]
    loss = policy_gradient_loss(student_logp_N, weight_N * reward_N)
    of_vocabulary = {}
    if outcome.loss_BT is not None and outcome.full_kl_BT is not None:
        loss = (weight_N * outcome.loss_BT[mask_BT]).sum()
        kl_N = outcome.full_kl_BT[mask_BT]
        of_vocabulary = {"kl/full_vocabulary": float(kl_N.mean()) if len(kl_N) else 0.0}
    num_tokens = len(reward_N)
    response_BT = trajectories.response_mask_BT
    is_drawn_BT = drawn(trajectories, labels)
    log_ratio_BT = log_ratios(outcome.logp_BT, trajectories.behaviour_logp_BT, is_drawn_BT)
    gap_N = log_ratio_BT[is_drawn_BT].abs()
    lengths_B = trajectories.response_lengths_B
    of_rewards = reward_metrics(reward_N, teacher_logp_N, student_logp_N)
    terminal_N = reward_N[trajectories.terminal_mask_BT[mask_BT]]
    eos_rate = float((trajectories.finish_B == FINISH_STOP).float().mean())
    return {
        "loss": float(loss) / max(num_tokens, 1),
        "grad_norm": outcome.grad_norm,
        **outcome.variance,
        "learning_rate": outcome.learning_rate,
        "grad_norm_per_reward": outcome.grad_norm / (of_rewards["reward/rms"] or math.inf),
        **of_rewards,
        **of_vocabulary,
        **({"reward/terminal_mean": float(terminal_N.mean())} if len(terminal_N) else {}),
        "entropy": float(outcome.entropy_BT[mask_BT].mean()) if num_tokens else 0.0,
        "response_length/mean": float(lengths_B.float().mean()),
        "response_length/max": int(lengths_B.max()),
        "rollout/eos_rate": eos_rate,
        "rollout/truncation_rate": 1 - eos_rate,
        "rollout/truncated_mass": float(trajectories.truncated_mass_BT[response_BT].mean()),
        "rollout/logp_gap": float(gap_N.max()) if len(gap_N) else 0.0,
        "rollout/logp_difference": float(gap_N.mean()) if len(gap_N) else 0.0,
        **({} if ratio is None else importance_metrics(log_ratio_BT, is_drawn_BT, ratio)),
        "num_tokens": num_tokens,
    }


def padding_metrics(
    batchings: Mapping[str, Batching], lengths: Sequence[int], *, num_parts: int
) -> dict[str, float]:
    """Return <model>/padding_fraction: the share of padding in what each model computed.

    The teacher takes the batch in num_parts consecutive parts of one size.
    """
    size = len(lengths) // num_parts
    parts = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return {
        f"{model}/padding_fraction": batching.padding_fraction(
            parts if model == "teacher" else [lengths]
        )
        for model, batching in batchings.items()
    }


def speed_metrics(seconds: Mapping[str, float], trajectories: Trajectories) -> dict[str, float]:
    """Return times, tokens_per_second and memory/peak_bytes.

    The rate is that of prompts and responses through rollout, teacher and student; evaluations
    and checkpoints don't count. The peak is of this rank's GPU, or of this process on a CPU.
    """
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    num_tokens = int(trajectories.total_lengths_B.sum())
    training_seconds = sum(seconds[f"time/{name}_seconds"] for name in TRAINING_PHASES)
    return {
        **seconds,
        "tokens_per_second": num_tokens / training_seconds,
        "memory/peak_bytes": peak,
    }


def step_diagnostics(
    trajectories: Trajectories,
    labels: Labels,
    teacher_logp_BT: Tensor,
    outcome: StudentOutcome,
) -> dict[str, Any]:
    """Return a record of diagnostics.jsonl: the rewards by position, magnitude and (p_T, p_S)."""
    reward_BT = outcome.reward(teacher_logp_BT, outcome.logp_BT)
    mask_BT = labels.mask_BT
    return {
        "reward_by_position": reward_by_position(reward_BT, mask_BT, trajectories.prompt_lengths_B),
        "reward_histogram": reward_histogram(reward_BT[mask_BT]),
        "reward_map": reward_map(
            reward_BT[mask_BT], teacher_logp_BT[mask_BT], outcome.logp_BT[mask_BT]
        ),
        "reward_surface": reward_surface(outcome.reward),
    }
