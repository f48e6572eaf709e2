"""Cutting a batch of trajectories into micro-batches, right-padded or packed.

Shapes: B sequences and T tokens of the whole batch; b sequences of a micro-batch, R rows and S
positions of its input (b and the longest sequence when padded, 1 and all tokens when packed; of
these, a rank's slices under context parallelism); N tokens in the loss that they predict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from poweropd_megatron.models.context_parallel import own_positions
from poweropd_megatron.models.packed import pack_params
from poweropd_megatron.models.scoring import ChosenTokens
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.batching import Batching

_PADDING = -1


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Some sequences of a batch, as a model takes them.

    Shapes: rows_b the sequences' numbers in the batch; token_ids_RS, 0 on padding; target_RS where
    in the flattened batch the token after each position is, -1 after a sequence's last; mask_RS
    True where that token is in the loss. packed_lengths: of what lies in a packed row, on all ranks
    that share it, each with its padding and that of the row last; None if padded.
    """

    rows_b: Tensor
    token_ids_RS: Tensor
    target_RS: Tensor
    mask_RS: Tensor
    packed_lengths: tuple[int, ...] | None

    def cut(self, whole_BT: Tensor) -> Tensor:
        """Return, of a per-token tensor of the whole batch, what is the next token's at each
        position, [R, S]."""
        return _take(whole_BT, self.target_RS)

    def put(self, whole_BT: Tensor, values_N: Tensor) -> None:
        """Write a value for each token in the loss, row by row, into a whole batch's tensor."""
        whole_BT.view(-1)[self.target_RS[self.mask_RS]] = values_N.detach().to(whole_BT)

    @property
    def packed_seq_params(self) -> PackedSeqParams | None:
        """Return what the model has to know of a packed row; None if padded."""
        return None if self.packed_lengths is None else pack_params(self.packed_lengths)

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
            is_chosen_BS=self.mask_RS.to(device),
            labels_BS=self.cut(labels_BT).to(device),
            vocab_size=vocab_size,
            tp_group=tp_group,
            logits_dtype=logits_dtype,
        )


def cut_batch(
    trajectories: Trajectories,
    mask_BT: Tensor,
    batching: Batching,
    *,
    dp_rank: int,
    cp_rank: int = 0,
) -> list[MicroBatch]:
    """Return the micro-batches of a data-parallel rank, or its slices of them.

    Raises: ValueError if a sequence's first token is in the loss: nothing predicts it.
    """
    if mask_BT[:, 0].any():
        raise ValueError("the first token of a sequence can't be in the loss")
    packs = batching.plan(trajectories.total_lengths_B.tolist())[dp_rank]
    return [cut_rows(trajectories, mask_BT, batching, rows, cp_rank=cp_rank) for rows in packs]


def cut_rows(
    trajectories: Trajectories,
    mask_BT: Tensor,
    batching: Batching,
    rows: Sequence[int],
    *,
    cp_rank: int,
) -> MicroBatch:
    """Return these sequences as a micro-batch, or a rank's slices of them."""
    lengths_b = trajectories.total_lengths_B[list(rows)].tolist()
    num_rows, width = batching.input_shape(lengths_b)
    packed_lengths = None
    starts_b: Sequence[int] = range(0, num_rows * width, width)
    if batching.is_packed:
        padded_b = [batching.padded_length(length) for length in lengths_b]
        starts_b = [0, *accumulate(padded_b)]
        packed_lengths = tuple(filter(None, (*padded_b, width - starts_b[-1])))
    source, target = torch.full((2, num_rows * width), _PADDING)
    for row, length, start in zip(rows, lengths_b, starts_b, strict=False):
        first = row * mask_BT.shape[1]
        source[start : start + length] = torch.arange(first, first + length)
        target[start : start + length - 1] = torch.arange(first + 1, first + length)
    source_RS, target_RS = (x.view(num_rows, width) for x in (source, target))
    if batching.cp_size > 1:
        own = own_positions(packed_lengths or [width], rank=cp_rank, size=batching.cp_size)
        source_RS, target_RS = source_RS[:, own], target_RS[:, own]
    return MicroBatch(
        rows_b=torch.tensor(rows, dtype=torch.int64),
        token_ids_RS=_take(trajectories.token_ids_BT, source_RS),
        target_RS=target_RS,
        mask_RS=_take(mask_BT, target_RS),
        packed_lengths=packed_lengths,
    )


def cut_own(
    trajectories: Trajectories, mask_BT: Tensor, batching: Batching, layout: Layout
) -> list[MicroBatch]:
    """Return this rank's micro-batches, or its slices of them; none on ranks without the model."""
    if not layout.holds_model:
        return []
    return cut_batch(
        trajectories, mask_BT, batching, dp_rank=layout.dp_rank, cp_rank=layout.cp_rank
    )


def rows_of(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Return the numbers of all sequences in the micro-batches."""
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *(micro_batch.rows_b for micro_batch in micro_batches)])


def _take(whole_BT: Tensor, places_RS: Tensor) -> Tensor:
    """Return the values at these places of the flattened batch, and 0 for padding."""
    taken_RS = whole_BT.flatten()[places_RS.clamp(min=0)]
    return taken_RS.where(places_RS != _PADDING, torch.zeros((), dtype=whole_BT.dtype))
