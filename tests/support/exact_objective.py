"""The sampled objectives as dense fp64 torch, written from their equations: none of the package.

Shapes: B sequences, T tokens, N tokens in the loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from poweropd_megatron.config.schema import ObjectiveConfig


def exact_rewards(objective: ObjectiveConfig, teacher: Tensor, student: Tensor) -> Tensor:
    """Return each token's reward, constant, before normalization over the batch."""
    student = student.detach()
    ratio = teacher - student
    alpha = {"prob_diff": 1.0, "sqrt_diff": 0.5}.get(objective.kind, objective.alpha)
    match objective.kind:
        case "log_ratio" | "z_score":
            return ratio
        case "clip":
            return ratio.clamp(objective.clip_low, objective.clip_high)
        case "tanh":
            return (ratio / objective.tau).tanh()
        case "box_cox":
            return ((alpha * teacher).exp() - (alpha * student).exp()) / alpha
        case "constant_negative":
            return -(student.exp() < objective.low_probability).to(student.dtype)
    return (alpha * teacher).exp() - (alpha * student).exp()


def normalized(objective: ObjectiveConfig, reward: Tensor, of_batch: Tensor) -> Tensor:
    """Return rewards normalized by the statistics of all rewards of the batch."""
    how = "z_score" if objective.kind == "z_score" else objective.reward_normalization
    if how == "z_score":
        mean = of_batch.sum() / of_batch.numel()
        return (reward - mean) / ((of_batch - mean) ** 2).mean().sqrt()
    if how == "sign_max_abs":
        scales = {sign: (sign * of_batch).max() for sign in (1, -1)}
        return torch.where(reward > 0, reward / scales[1], reward / scales[-1])
    return reward


def exact_weights(
    objective: ObjectiveConfig,
    student_BT: Tensor,
    behaviour_BT: Tensor,
    mask_BT: Tensor,
    is_drawn_BT: Tensor,
    micro_batches: Sequence[Sequence[int]],
) -> Tensor:
    """Return what each token's reward * log-prob is multiplied with in the loss, [B, T]."""
    weight_BT = torch.zeros(mask_BT.shape, dtype=torch.float64)
    if objective.loss_normalization == "token_mean":
        groups = [list(range(len(mask_BT)))]
    elif objective.loss_normalization == "sequence_mean":
        groups = [[row] for row in range(len(mask_BT)) if mask_BT[row].any()]
    else:
        groups = [list(rows) for rows in micro_batches]
    for rows in groups:
        count = int(mask_BT[rows].sum())
        weight_BT[rows] = 1 / (len(groups) * max(count, 1))
    if objective.importance_ratio != "none":
        difference_BT = torch.where(is_drawn_BT, student_BT.detach() - behaviour_BT, 0.0).double()
        if objective.importance_ratio == "sequence":
            difference_BT = difference_BT.sum(dim=1, keepdim=True).expand_as(difference_BT)
        ratio_BT = difference_BT.exp().clamp(objective.ratio_low, objective.ratio_high)
        weight_BT *= ratio_BT
    return torch.where(mask_BT, weight_BT, 0.0)


def exact_loss(
    objective: ObjectiveConfig,
    student_BT: Tensor,
    teacher_BT: Tensor,
    weight_BT: Tensor,
    mask_BT: Tensor,
    of_batch_N: Tensor,
) -> Tensor:
    """Return - sum of weight * reward * log p_S over the tokens in the loss, differentiable.

    of_batch_N: the rewards, before normalization, of the whole batch's tokens.
    """
    reward_N = exact_rewards(objective, teacher_BT[mask_BT], student_BT[mask_BT])
    reward_N = normalized(objective, reward_N, of_batch_N)
    return -(weight_BT[mask_BT] * reward_N * student_BT[mask_BT]).sum()
