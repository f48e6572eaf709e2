"""The core attention against Megatron's own, and packed sequences against each by itself.

Shapes: S positions, B sequences, Hq query heads, Hk key heads, D channels a head, T tokens.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from support.attention_checks import (
    HEADS,
    PACKS,
    D,
    config,
    errors,
    exact,
    exact_packed,
    random_inputs,
    values_and_gradients,
)
from torch import Tensor

from poweropd_megatron.models.layers import RowRotaryEmbedding, SDPACoreAttention
from poweropd_megatron.models.packed import pack_params, packed_lengths
from poweropd_megatron.parallel.layout import Layout


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dense_values_and_gradients_are_those_of_megatron(
    dtype: torch.dtype, heads: str, layout: Layout
) -> None:
    """In bf16, where both round: the error against fp64 is at most twice Megatron's."""
    model = config(HEADS[heads], dtype)
    inputs = random_inputs((33, 3), HEADS[heads], dtype)
    theirs = DotProductAttention(model, 1, AttnMaskType.causal, "self", pg_collection=layout.groups)
    reference = exact(inputs)
    our_errors = errors(values_and_gradients(SDPACoreAttention(model), inputs), reference)
    is_later = torch.ones(1, 1, 33, 33, dtype=torch.bool).triu(1)
    their_errors = errors(
        values_and_gradients(lambda *x: theirs(*x, attention_mask=is_later), inputs), reference
    )
    for ours, megatrons in zip(our_errors, their_errors, strict=True):
        assert ours <= max(2 * megatrons, 1e-6)
        assert megatrons <= (1e-6 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
def test_packed_values_and_gradients_are_those_of_each_sequence_by_itself(
    pack: str, heads: str
) -> None:
    lengths = PACKS[pack]
    inputs = random_inputs((sum(lengths),), HEADS[heads], torch.float32)
    attention = SDPACoreAttention(config(HEADS[heads]))
    packed = pack_params(lengths)
    found = values_and_gradients(lambda *x: attention(*x, packed_seq_params=packed), inputs)

    def one_by_one(*whole: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths) for x in whole), strict=True)
        return torch.cat([attention(*(x[:, None] for x in part))[:, 0] for part in parts])

    assert max(errors(found, values_and_gradients(one_by_one, inputs))) <= 1e-6
    assert max(errors(found, exact_packed(inputs, lengths))) <= 1e-6


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_sequence_of_nan_reaches_no_other_in_values_or_gradients(broken: int) -> None:
    lengths = [6, 6, 3]
    inputs = random_inputs((sum(lengths),), (4, 2), torch.float32)
    for x in inputs:
        x.split(lengths)[broken].fill_(float("nan"))
    attention = SDPACoreAttention(config((4, 2)))
    packed = pack_params(lengths)
    for tensor in values_and_gradients(lambda *x: attention(*x, packed_seq_params=packed), inputs):
        are_nan = [bool(part.isnan().any()) for part in tensor.split(lengths)]
        assert are_nan == [number == broken for number in range(len(lengths))]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_rotary_angles_start_anew_with_each_packed_sequence(
    layout: Layout, lengths: list[int]
) -> None:
    rotary = RowRotaryEmbedding(
        kv_channels=D,
        rotary_percent=1.0,
        use_cpu_initialization=True,
        cp_group=layout.groups.cp,
    )
    whole = rotary(max(lengths))
    arguments: tuple[Any, ...] = (None, None, None, SimpleNamespace(), pack_params(lengths))
    angles = rotary(rotary.get_rotary_seq_len(*arguments), packed_seq=True)
    assert angles.shape == (sum(lengths), 1, 1, D)
    for part, length in zip(angles.split(lengths), lengths, strict=True):
        assert torch.equal(part, whole[:length])


def test_megatron_is_told_the_boundaries_in_its_own_terms() -> None:
    packed = pack_params([4, 2, 7])
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 4, 6, 13]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 7
    assert packed_lengths(packed) == [4, 2, 7]
