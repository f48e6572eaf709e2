"""The updates of training.py in plain fp64 torch: no Megatron, none of the package's models.

Shapes: B sequences, T tokens, V vocabulary, U updates.
"""

from pathlib import Path

import torch
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

from poweropd_megatron.config.objective import ObjectiveKind


def update_in_plain_torch(
    student_folder: str, teacher_folder: str, kind: ObjectiveKind = "power"
) -> Measured:
    """Return what the updates come to without Megatron or this package's models, in fp64."""
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
    is_exact = kind in LOSSES
    labels = masked_labels(trajectories) if is_exact else fixed_labels(trajectories)
    ids_BT, mask_BT = trajectories.token_ids_BT, labels.mask_BT
    with torch.no_grad():
        teacher_logp_BT, _, teacher_logp_BTV = _score(teacher, ids_BT, labels.teacher_BT, mask_BT)
    logps, entropies, losses, norms, gradients = [], [], [], [], {}
    for update in range(NUM_UPDATES):
        logp_BT, entropy_BT, logp_BTV = _score(student, ids_BT, labels.student_BT, mask_BT)
        reward_BT = teacher_logp_BT.exp() - logp_BT.detach().exp()
        loss = -(reward_BT * logp_BT)[mask_BT].mean()
        if is_exact:
            loss = LOSSES[kind](logp_BTV[mask_BT], teacher_logp_BTV[mask_BT]).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: [weight.grad.clone()] for name, weight in weights.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), OPTIMIZER.clip_grad))
        for group in optimizer.param_groups:
            share = update / NUM_UPDATES
            group["lr"] = (1 - share) * OPTIMIZER.lr + share * OPTIMIZER.min_lr
        optimizer.step()
        logps.append(logp_BT.detach())
        entropies.append(entropy_BT.detach())
        losses.append(loss.detach())
    return Measured(
        teacher_logp_BT=teacher_logp_BT,
        logp_UBT=torch.stack(logps),
        entropy_UBT=torch.stack(entropies),
        loss_U=torch.stack(losses),
        grad_norm_U=torch.stack(norms),
        gradients=gradients,
        weights={name: [weight.detach()] for name, weight in weights.items()},
        padding=[],
    )


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
