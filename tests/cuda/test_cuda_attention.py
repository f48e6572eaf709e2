"""Packed attention on a GPU: the variable-length kernel, and the loop where there is none."""

from itertools import accumulate

import pytest
import torch
from support.attention_checks import (
    HEADS,
    PACKS,
    config,
    errors,
    exact,
    exact_packed,
    random_inputs,
    values_and_gradients,
)
from torch import Tensor

from poweropd_megatron.models import layers
from poweropd_megatron.models.attention_kernels import (
    attend_causally,
    attend_varlen,
    has_varlen_kernel,
)
from poweropd_megatron.models.layers import SDPACoreAttention
from poweropd_megatron.models.packed import pack_params

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the norm; bf16's is that of one rounding of the probabilities and one of the result."""


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["varlen", "loop"])
def test_packed_values_and_gradients_are_those_of_fp64(
    kernel: str, dtype: torch.dtype, pack: str, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = PACKS[pack]
    inputs = random_inputs((sum(lengths),), HEADS[heads], dtype, "cuda")
    if kernel == "loop":
        monkeypatch.setattr(layers, "has_varlen_kernel", lambda _: False)
    elif not layers.has_varlen_kernel(inputs[0]):
        pytest.skip("no variable-length kernel for this type, GPU or torch")
    attention = SDPACoreAttention(config(HEADS[heads], dtype))
    packed = pack_params(lengths)
    found = values_and_gradients(lambda *x: attention(*x, packed_seq_params=packed), inputs)
    assert max(errors(found, exact_packed(inputs, lengths))) <= TOLERANCE[dtype]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_dense_values_and_gradients_are_those_of_fp64(dtype: torch.dtype, heads: str) -> None:
    inputs = random_inputs((33, 3), HEADS[heads], dtype, "cuda")
    attention = SDPACoreAttention(config(HEADS[heads], dtype))
    assert max(errors(values_and_gradients(attention, inputs), exact(inputs))) <= TOLERANCE[dtype]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["varlen", "sdpa"])
def test_the_last_queries_of_sequences_get_what_all_of_them_get_in_fp64(
    kernel: str, dtype: torch.dtype, heads: str
) -> None:
    """As slices of sequences do under context parallelism: the last 16 of 48, three times."""
    count, num_queries, num_keys = 3, 16, 48
    inputs = random_inputs((num_keys, count), HEADS[heads], dtype, "cuda")
    if kernel == "varlen" and not has_varlen_kernel(inputs[0]):
        pytest.skip("no variable-length kernel for this type, GPU or torch")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query[-num_queries:]
        if kernel == "sdpa":
            rows = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return attend_causally(*rows, scale=None).permute(2, 0, 1, 3).flatten(2)
        packs = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        boundaries_q, boundaries_k = (
            torch.tensor([0, *accumulate([n] * count)], dtype=torch.int32, device="cuda")
            for n in (num_queries, num_keys)
        )
        attended = attend_varlen(
            *packs,
            boundaries_q=boundaries_q,
            boundaries_k=boundaries_k,
            longest_q=num_queries,
            longest_k=num_keys,
            scale=None,
        )
        return attended.unflatten(0, (count, num_queries)).transpose(0, 1).flatten(2)

    def attend_whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return attend_causally(*rows, scale=None).permute(2, 0, 1, 3).flatten(2)[-num_queries:]

    query, key, value = (x.double() for x in inputs)
    reference = values_and_gradients(attend_whole, (query, key, value))
    assert max(errors(values_and_gradients(attend, inputs), reference)) <= TOLERANCE[dtype]
