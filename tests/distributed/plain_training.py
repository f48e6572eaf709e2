"""The updates of training.py in plain fp64 torch: no Megatron, none of the package's models.

Shapes: B sequences, T tokens, V vocabulary, U updates.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from support.exact_objective import exact_weights
from support.plain_qwen3 import PlainQwen3
from support.vocabulary_cases import LOSSES
from torch import Tensor
from training import (
    NUM_UPDATES,
    OPTIMIZER,
    Measured,
    fixed_labels,
    fixed_trajectories,
    masked_labels,
)

from poweropd_megatron.config.objective import ObjectiveConfig

POWER = ObjectiveConfig(kind="power")


def update_in_plain_torch(
    student_folder: str,
    teacher_folder: str,
    objective: ObjectiveConfig = POWER,
    *,
    mini_batch_size: int | None = None,
    micro_batch_size: int = 2,
) -> Measured:
    """Return what the updates come to without Megatron or this package's models, in fp64.

    Of mini-batches, each update's grad_norm is the mean of theirs, and gradients are the first's.
    """
    student = PlainQwen3.from_folder(Path(student_folder))
    teacher = PlainQwen3.from_folder(Path(teacher_folder))
    weights = student.weights
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight for weight in weights.values() if weight.dim() == 2]},
            {"params": [w for w in weights.values() if w.dim() == 1], "weight_decay": 0.0},
        ],
        weight_decay=OPTIMIZER.weight_decay,
        betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2),
        eps=OPTIMIZER.adam_eps,
    )
    trajectories = fixed_trajectories()
    is_exact = objective.kind in LOSSES
    labels = (
        masked_labels(trajectories, objective.window_first_percent)
        if is_exact
        else fixed_labels(trajectories)
    )
    ids_BT, mask_BT = trajectories.token_ids_BT, labels.mask_BT
    with torch.no_grad():
        teacher_logp_BT, _, teacher_logp_BTV = _score(teacher, ids_BT, labels.teacher_BT, mask_BT)
    size = mini_batch_size or len(ids_BT)
    parts = [slice(start, start + size) for start in range(0, len(ids_BT), size)]
    decay_steps = NUM_UPDATES * (len(ids_BT) // size)
    logps, entropies, losses, norms, gradients = [], [], [], [], {}
    for step in range(NUM_UPDATES * len(parts)):
        part = parts[step % len(parts)]
        mask = mask_BT[part]
        logp_BT, entropy_BT, logp_BTV = _score(student, ids_BT[part], labels.student_BT[part], mask)
        lengths = trajectories.total_lengths_B[part].tolist()
        micro_batches = _by_length(lengths, micro_batch_size)
        weight_BT = exact_weights(objective, logp_BT, logp_BT, mask, mask, micro_batches)
        reward_BT = teacher_logp_BT[part].exp() - logp_BT.detach().exp()
        loss_N = -(reward_BT * logp_BT)[mask]
        if is_exact:
            loss_N = LOSSES[objective.kind](logp_BTV[mask], teacher_logp_BTV[part][mask])
        loss = (weight_BT[mask] * loss_N).sum()
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: [weight.grad.clone()] for name, weight in weights.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), OPTIMIZER.clip_grad))
        for group in optimizer.param_groups:
            share = min(step / decay_steps, 1)
            group["lr"] = (1 - share) * OPTIMIZER.lr + share * OPTIMIZER.min_lr
        optimizer.step()
        logps.append(logp_BT.detach())
        entropies.append(entropy_BT.detach())
        losses.append(loss.detach() * mask.sum() / mask_BT.sum())
    return Measured(
        teacher_logp_BT=teacher_logp_BT,
        logp_UBT=torch.cat(logps).view(NUM_UPDATES, *ids_BT.shape),
        entropy_UBT=torch.cat(entropies).view(NUM_UPDATES, *ids_BT.shape),
        loss_U=torch.stack(losses).view(NUM_UPDATES, -1).sum(dim=1),
        grad_norm_U=torch.stack(norms).view(NUM_UPDATES, -1).mean(dim=1),
        gradients=gradients,
        weights={name: [weight.detach()] for name, weight in weights.items()},
        padding=[],
    )


def _by_length(lengths: Sequence[int], micro_batch_size: int) -> list[list[int]]:
    """Return the rows of each micro-batch of one rank: those of like length go together."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [
        rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)
    ]


def _score(
    model: PlainQwen3, ids_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs and entropies of the tokens in the loss, 0 elsewhere; and of all tokens."""
    logp_BTV = torch.nan_to_num(model.logprobs(ids_BT))
    last = logp_BTV.shape[2] - 1
    logp_BT = logp_BTV.gather(2, labels_BT.clamp(max=last)[:, :, None])[:, :, 0]
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(dim=2)
    masked = (torch.where(mask_BT, values, 0.0) for values in (logp_BT, entropy_BT))
    return *masked, logp_BTV
