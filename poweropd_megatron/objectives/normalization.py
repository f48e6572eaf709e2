"""How much each token of a batch counts in the loss. Shapes: B sequences, T tokens."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

LossNormalization = Literal["token_mean", "sequence_mean", "micro_batch_mean"]


def loss_weights(
    mask_BT: Tensor, normalization: LossNormalization, micro_batches: Sequence[Sequence[int]]
) -> Tensor | None:
    """Return what each sequence's tokens count in the mean over all tokens, [B] fp32.

    None for token_mean: 1 each. sequence_mean: the mean over the sequences that have tokens in the
    loss, of the mean over their tokens. micro_batch_mean: the mean over micro-batches of the mean
    over their tokens; one whose tokens are all masked counts, with a loss of 0.
    mask_BT and micro_batches, the sequences' numbers in each, are those of the whole optimizer step
    on all data-parallel ranks, so that the weights are the same on each rank and mean to the
    division by the step's token count what that would be to the mean of means.
    Source: PowerOPD's released trainer, token_loss_normalization: window_token_mean is token_mean,
    microbatch_mean is micro_batch_mean.
    """
    if normalization == "token_mean":
        return None
    tokens = mask_BT.sum(dim=1).tolist()
    if normalization == "sequence_mean":
        groups = [[row] for row, count in enumerate(tokens) if count]
    else:
        groups = [list(rows) for rows in micro_batches if rows]
    weights_B = torch.zeros(len(mask_BT))
    for rows in groups:
        in_group = sum(tokens[row] for row in rows)
        weights_B[rows] = sum(tokens) / (len(groups) * max(in_group, 1))
    return weights_B
