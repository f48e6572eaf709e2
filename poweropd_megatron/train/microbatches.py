"""Cutting a batch of trajectories into right-padded micro-batches.

Shapes: B sequences of the whole batch, b of a micro-batch, T tokens, S tokens of a micro-batch's
longest sequence, N tokens in the loss.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from poweropd_megatron.models.scoring import ChosenTokens
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.rollout.trajectories import Trajectories


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Some rows of a batch, cut to their longest sequence.

    Shapes: rows_b the rows' numbers in the batch; token_ids_bS; mask_bS True at the tokens in the
    loss.
    """

    rows_b: Tensor
    token_ids_bS: Tensor
    mask_bS: Tensor

    def cut(self, whole_BT: Tensor) -> Tensor:
        """Return this micro-batch's part of a per-token tensor of the whole batch, [b, S]."""
        return _cut_or_pad(whole_BT[self.rows_b], self.token_ids_bS.shape[1])

    def put(self, whole_BT: Tensor, values_N: Tensor) -> None:
        """Write a value for each token in the loss, row by row, into a whole batch's tensor."""
        row_N, position_N = self.mask_bS.nonzero(as_tuple=True)
        whole_BT[self.rows_b[row_N], position_N] = values_N.detach().to(whole_BT)

    def chosen(
        self,
        labels_BT: Tensor,
        *,
        vocab_size: int,
        tp_group: dist.ProcessGroup,
        logits_dtype: torch.dtype,
        device: torch.device,
    ) -> ChosenTokens:
        """Return what the model is to score here."""
        return ChosenTokens(
            is_chosen_BS=self.mask_bS.to(device),
            labels_BS=self.cut(labels_BT).to(device),
            vocab_size=vocab_size,
            tp_group=tp_group,
            logits_dtype=logits_dtype,
        )


def plan(
    trajectories: Trajectories,
    mask_BT: Tensor,
    rows: Tensor,
    layout: Layout,
    *,
    micro_batch_size: int,
) -> list[MicroBatch]:
    """Return the micro-batches of a data-parallel rank's rows, sequences of like length together.

    Each row is in exactly one; all but the last have micro_batch_size rows; no rows make none.
    Lengths are rounded up to a multiple of the tensor-parallel size where sequence parallelism
    needs it.
    """
    lengths = trajectories.total_lengths_B[rows]
    by_length = rows[lengths.argsort(descending=True, stable=True)]
    multiple = layout.tp_size if layout.parallel.sequence_parallel else 1
    batches = []
    for rows_b in torch.split(by_length, micro_batch_size) if len(rows) else ():
        longest = int(trajectories.total_lengths_B[rows_b].max())
        length = -(-longest // multiple) * multiple
        batches.append(
            MicroBatch(
                rows_b=rows_b,
                token_ids_bS=_cut_or_pad(trajectories.token_ids_BT[rows_b], length),
                mask_bS=_cut_or_pad(mask_BT[rows_b], length),
            )
        )
    return batches


def fill_up(
    micro_batches: list[MicroBatch], multiple: int, trajectories: Trajectories, layout: Layout
) -> list[MicroBatch]:
    """Return the micro-batches and, up to a multiple, idle ones without a token in the loss.

    Megatron's interleaved schedule needs a multiple of its group size.
    """
    length = layout.tp_size if layout.parallel.sequence_parallel else 1
    return micro_batches + [_idle(trajectories, length)] * (-len(micro_batches) % multiple)


def _idle(trajectories: Trajectories, length: int) -> MicroBatch:
    """Return a micro-batch that makes this rank take part in a forward and changes nothing."""
    token_ids_bS = _cut_or_pad(trajectories.token_ids_BT[:1], length)
    return MicroBatch(
        rows_b=torch.zeros(1, dtype=torch.int64),
        token_ids_bS=token_ids_bS,
        mask_bS=torch.zeros_like(token_ids_bS, dtype=torch.bool),
    )


def _cut_or_pad(rows_bT: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(rows_bT[:, :length], (0, max(length - rows_bT.shape[1], 0)))
