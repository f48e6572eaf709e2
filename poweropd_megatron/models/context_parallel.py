"""Context parallelism: each rank has two slices of every sequence, and looks at the keys of all.

A sequence is cut into 2 * C slices over C ranks; rank r has slices r and 2 * C - 1 - r, as
Megatron deals them out, so that causal attention is as much work on each. A rank's tokens are
those of each sequence in turn, its earlier slice first.
Shapes: T tokens of this rank, Hq query heads and Hk key heads, D channels a head; n sequences of
equal length, of slices of m tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from poweropd_megatron.models.attention_kernels import (
    attend_causally,
    attend_varlen,
    has_varlen_kernel,
)


def own_positions(lengths: Sequence[int], *, rank: int, size: int) -> Tensor:
    """Return which positions of sequences that lie end to end are a rank's, in its order.

    Each length must be a multiple of 2 * size.
    """
    slices = []
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        of_sequence = torch.arange(end - length, end).view(2 * size, -1)
        slices += [of_sequence[rank], of_sequence[2 * size - 1 - rank]]
    return torch.cat(slices)


@contextmanager
def whole_sequences(chunks: Sequence[Any]) -> Iterator[None]:
    """Let each rank compute sequences of its own inside the block, whole, as rollouts do."""
    modules = [chunk.rotary_pos_emb for chunk in chunks] + [
        layer.self_attention.core_attention for chunk in chunks for layer in chunk.decoder.layers
    ]
    for module in modules:
        module.is_sliced = False
    try:
        yield
    finally:
        for module in modules:
            module.is_sliced = True


@dataclass(frozen=True)
class _Slices:
    """Slices of n sequences and all that comes before: query [n, m, Hq, D], key and value [n, keys,
    Hk, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


def attend_sliced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Sequence[int],
    group: dist.ProcessGroup,
    scale: float | None,
) -> Tensor:
    """Return the attended values of this rank's slices, [T, Hq, D].

    Shapes: query [T, Hq, D], key and value [T, Hk, D] of sequences of these lengths, whole, each a
    multiple of 2 * C.
    Cost: an all-gather of keys and values, and a reduce-scatter of their gradients; then each slice
    attends to what is not later. The work is balanced, but each rank has all keys of the layer.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=group)
    runs = [(len(list(run)), length) for length, run in groupby(lengths)]
    tokens = [count * length // size for count, length in runs]
    of_ranks = both.unflatten(0, (size, -1)).split(tokens, dim=1)
    slices = []
    for (count, length), own, gathered in zip(
        runs, torch.split(query, tokens), of_ranks, strict=True
    ):
        m = length // (2 * size)
        # [C, n, 2, m, ...] to [n, 2 * C * m, ...]: the earlier slices of ranks 0, 1, ..., then
        # the later ones of ..., 1, 0.
        pairs = gathered.unflatten(1, (count, 2, m))
        ordered = torch.cat([pairs[:, :, 0], pairs[:, :, 1].flip(0)]).transpose(0, 1).flatten(1, 2)
        key_nSHD, value_nSHD = ordered.unbind(2)
        own_slices = own.view(count, 2, m, *own.shape[1:]).unbind(1)
        for query_nmHD, number in zip(own_slices, (rank, 2 * size - 1 - rank), strict=True):
            visible = (number + 1) * m
            slices.append(_Slices(query_nmHD, key_nSHD[:, :visible], value_nSHD[:, :visible]))
    attend = _attend_in_one_kernel if has_varlen_kernel(query) else _attend_one_by_one
    attended = attend(slices, scale)
    both_slices = zip(attended[::2], attended[1::2], strict=True)
    return torch.cat([torch.stack(pair, dim=1).flatten(0, 2) for pair in both_slices])


def _attend_one_by_one(slices: Sequence[_Slices], scale: float | None) -> list[Tensor]:
    """Return the attended values of each, [n, m, Hq, D]."""
    return [
        attend_causally(
            part.query.transpose(1, 2),
            part.key.transpose(1, 2),
            part.value.transpose(1, 2),
            scale=scale,
        ).transpose(1, 2)
        for part in slices
    ]


def _attend_in_one_kernel(slices: Sequence[_Slices], scale: float | None) -> list[Tensor]:
    """Return the same by a kernel of variable lengths, each slice a sequence of its own."""
    query, key, value = (
        torch.cat([getattr(part, name).flatten(0, 1) for part in slices])
        for name in ("query", "key", "value")
    )
    lengths_q = [part.query.shape[1] for part in slices for _ in range(len(part.query))]
    lengths_k = [part.key.shape[1] for part in slices for _ in range(len(part.key))]
    boundaries_q, boundaries_k = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(
            query.device, non_blocking=True
        )
        for lengths in (lengths_q, lengths_k)
    )
    attended = attend_varlen(
        query,
        key,
        value,
        boundaries_q=boundaries_q,
        boundaries_k=boundaries_k,
        longest_q=max(lengths_q),
        longest_k=max(lengths_k),
        scale=scale,
    )
    shapes = [part.query.shape[:2] for part in slices]
    parts = torch.split(attended, [count * m for count, m in shapes])
    return [part.view(*shape, *part.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]
