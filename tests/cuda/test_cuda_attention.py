"""Packed attention on a GPU: the variable-length kernel, and the loop where there is none."""

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

from poweropd_megatron.models import layers
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
        monkeypatch.setattr(layers, "_has_varlen_kernel", lambda _: False)
    elif not layers._has_varlen_kernel(inputs[0]):
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
