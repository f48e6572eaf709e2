"""Attention over slices of sequences on several ranks against whole sequences in fp64.

Shapes: T tokens, S positions, B sequences, Hq query heads, Hk key heads, D channels a head.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank
from support.attention_checks import (
    D,
    config,
    errors,
    exact,
    exact_packed,
    random_inputs,
    values_and_gradients,
)
from support.rank_pool import RankPool
from torch import Tensor

from poweropd_megatron.models import context_parallel
from poweropd_megatron.models.attention_kernels import attend_causally
from poweropd_megatron.models.context_parallel import own_positions
from poweropd_megatron.models.layers import RowRotaryEmbedding, SDPACoreAttention
from poweropd_megatron.models.packed import pack_params
from poweropd_megatron.parallel import cpu_device

HEADS = (4, 2)
PACKS = {
    "ragged": [8, 24, 16, 8],
    "runs of equal length": [16, 16, 8, 8, 8],
    "one sequence": [40],
}


def zigzag(length: int, rank: int, size: int) -> list[int]:
    """Return the positions of slices r and 2 * C - 1 - r, counted out one by one."""
    width = length // (2 * size)
    numbers = (rank, 2 * size - 1 - rank)
    return [number * width + i for number in numbers for i in range(width)]


def attention_of_ranks(dtype: torch.dtype) -> SDPACoreAttention:
    cpu_device.install()
    groups = SimpleNamespace(cp=dist.group.WORLD)
    return SDPACoreAttention(config(HEADS, dtype), pg_collection=groups)


def one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    boundaries_q: Tensor,
    boundaries_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float | None,
) -> Tensor:
    """Return what a GPU's kernel of variable lengths does, which no CPU has."""
    lengths_q, lengths_k = (x.diff().tolist() for x in (boundaries_q, boundaries_k))
    assert (max(lengths_q), max(lengths_k)) == (longest_q, longest_k)
    parts = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    return torch.cat(
        [
            attend_causally(*(x.transpose(0, 1)[None] for x in part), scale=scale)[0].transpose(
                0, 1
            )
            for part in parts
        ]
    )


def attend_on_ranks(
    shape: tuple[int, ...],
    lengths: list[int] | None,
    dtype: torch.dtype,
    in_one_kernel: bool = False,
) -> list[Tensor]:
    """Return values and gradients of all ranks, put together in the order of whole sequences."""
    if in_one_kernel:
        context_parallel.has_varlen_kernel = lambda _: True
        context_parallel.attend_varlen = one_by_one
    rank, size = dist.get_rank(), dist.get_world_size()
    attention = attention_of_ranks(dtype)
    packed = None if lengths is None else pack_params(lengths)
    starts = [sum((lengths or [])[:number]) for number in range(len(lengths or [0]))]
    own = torch.tensor(
        [
            start + position
            for start, length in zip(starts, lengths or [shape[0]], strict=True)
            for position in zigzag(length, rank, size)
        ]
    )
    generator = torch.Generator().manual_seed(1)
    whole_gradient = torch.randn(*shape, HEADS[0] * D, generator=generator).to(dtype)
    leaves = [x[own].clone().requires_grad_() for x in random_inputs(shape, HEADS, dtype)]
    attended = attention(*leaves, packed_seq_params=packed)
    attended.backward(whole_gradient[own])
    wholes = []
    for part in (attended.detach(), *(leaf.grad for leaf in leaves)):
        assert part is not None
        whole = torch.zeros(shape[0], *part.shape[1:], dtype=torch.float64)
        whole[own] = part.double()
        dist.all_reduce(whole)
        wholes.append(whole)
    return wholes


@pytest.mark.parametrize("in_one_kernel", [False, True], ids=["sdpa", "varlen"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("pack", PACKS)
def test_slices_of_a_pack_attend_as_whole_sequences_do(
    pack: str, size: int, in_one_kernel: bool, ranks: RankPool
) -> None:
    lengths = PACKS[pack]
    shape = (sum(lengths),)
    expected = exact_packed(random_inputs(shape, HEADS, torch.float32), lengths)
    arguments = (shape, lengths, torch.float32, in_one_kernel)
    for found in ranks.run(attend_on_ranks, *arguments, world_size=size):
        assert max(errors(found, expected)) <= 1e-6


@pytest.mark.parametrize("size", [2, 4])
def test_slices_of_rows_attend_as_whole_rows_do(size: int, ranks: RankPool) -> None:
    expected = exact(random_inputs((32, 3), HEADS, torch.float32))
    for found in ranks.run(attend_on_ranks, (32, 3), None, torch.float32, world_size=size):
        assert max(errors(found, expected)) <= 1e-6


def test_slices_in_bf16_are_as_near_to_fp64_as_whole_rows_in_bf16(ranks: RankPool) -> None:
    inputs = random_inputs((32, 3), HEADS, torch.bfloat16)
    expected = exact(inputs)
    whole = SDPACoreAttention(config(HEADS, torch.bfloat16))
    bounds = errors(values_and_gradients(whole, inputs), expected)
    for found in ranks.run(attend_on_ranks, (32, 3), None, torch.bfloat16, world_size=2):
        for ours, bound in zip(errors(found, expected), bounds, strict=True):
            assert 0 < ours <= 2 * bound


def angles_on_ranks(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's angles, Megatron's choice of all, and all while sequences are whole."""
    cpu_device.install()
    rotary = RowRotaryEmbedding(
        kv_channels=D,
        rotary_percent=1.0,
        use_cpu_initialization=True,
        cp_group=dist.group.WORLD,
    )
    own = rotary(length)
    rotary.is_sliced = False
    whole = rotary(length)
    return (
        own,
        _get_thd_freqs_on_this_cp_rank(dist.get_rank(), dist.get_world_size(), own, whole),
        whole,
    )


def test_rotary_angles_are_those_of_a_ranks_positions_as_megatron_deals_them(
    ranks: RankPool,
) -> None:
    for rank, (own, megatrons, whole) in enumerate(ranks.run(angles_on_ranks, 24, world_size=2)):
        assert len(whole) == 24
        assert torch.equal(own, megatrons)
        assert torch.equal(own, whole[zigzag(24, rank, 2)])


def test_ranks_share_the_positions_of_each_sequence() -> None:
    lengths = [8, 16]
    by_rank = [own_positions(lengths, rank=rank, size=2).tolist() for rank in range(2)]
    assert by_rank == [
        [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23],
        [2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 18, 19],
    ]
