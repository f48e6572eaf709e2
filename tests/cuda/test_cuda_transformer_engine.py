"""Transformer Engine's attention on a GPU, through Megatron's class and ours, against fp64."""

import pytest
import torch
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.transformer.enums import AttnBackend
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
from support.transformer_engine import core_attention

from poweropd_megatron.models.packed import pack_params
from poweropd_megatron.models.transformer_engine import why_not_transformer_engine
from poweropd_megatron.parallel.layout import Layout

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not megatron_te.HAVE_TE, reason="needs Transformer Engine"),
]
TOLERANCE = 2e-2
"""Of the norm: one rounding of the probabilities to bf16, and one of the result."""


def test_a_bf16_model_has_transformer_engines_attention() -> None:
    assert why_not_transformer_engine(AttnBackend.auto, "bf16") is None


@pytest.mark.parametrize("heads", HEADS)
def test_rows_are_those_of_fp64(heads: str, layout: Layout) -> None:
    inputs = random_inputs((33, 3), HEADS[heads], torch.bfloat16, "cuda")
    found = values_and_gradients(
        core_attention(config(HEADS[heads], torch.bfloat16), layout.groups), inputs
    )
    assert max(errors(found, exact(inputs))) <= TOLERANCE


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
def test_packs_are_those_of_fp64(pack: str, heads: str, layout: Layout) -> None:
    lengths = PACKS[pack]
    inputs = random_inputs((sum(lengths),), HEADS[heads], torch.bfloat16, "cuda")
    attention, packed = (
        core_attention(config(HEADS[heads], torch.bfloat16), layout.groups),
        pack_params(lengths),
    )
    found = values_and_gradients(lambda *x: attention(*x, packed_seq_params=packed), inputs)
    assert max(errors(found, exact_packed(inputs, lengths))) <= TOLERANCE
