"""Sequences packed end to end in one row, as Megatron is told of them."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams


def pack_params(lengths: Sequence[int]) -> PackedSeqParams:
    """Return what Megatron has to know of sequences of these lengths, one after the other.

    The boundaries stay on the CPU, where Megatron's rotary code and the attention read them as
    numbers: on a GPU each reading would wait for it.
    """
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def packed_lengths(packed: PackedSeqParams) -> list[int]:
    """Return the lengths of the sequences of a pack."""
    lengths: list[int] = packed.cu_seqlens_q.diff().tolist()
    return lengths
