"""Causal grouped-query attention written out in fp64, and the cases that it is compared on.

Shapes: S positions, B sequences, Hq query heads, Hk key heads, D channels a head, T tokens; dense
inputs are [S, B, H, D], packed ones [T, H, D].
"""

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

D = 8
HEADS = {"multi-head": (4, 4), "grouped-query": (6, 2), "one key head": (4, 1)}
PACKS = {
    "ragged": [7, 1, 12, 5],
    "runs of equal length": [9, 9, 4, 4, 4, 2],
    "one sequence": [17],
    "single tokens": [1, 1, 1],
    "very different lengths": [90, 1, 2, 40],
}
Inputs = tuple[Tensor, Tensor, Tensor]


def config(heads: tuple[int, int], dtype: torch.dtype = torch.float32) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=heads[0] * D,
        num_attention_heads=heads[0],
        num_query_groups=heads[1],
        kv_channels=D,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        masked_softmax_fusion=False,
    )


def random_inputs(
    shape: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype, device: str = "cpu"
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(*shape, count, D, generator=generator).to(device, dtype)
        for count in (heads[0], heads[1], heads[1])
    )
    return query, key, value


def values_and_gradients(attend: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """Return the attended values and the gradients of the inputs, for a fixed gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    attended = attend(*leaves)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(attended.shape, generator=generator).to(attended)
    attended.backward(gradient)
    return [attended.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def exact(inputs: Inputs) -> list[Tensor]:
    """Return values and gradients of causal attention written out in fp64."""
    query, key, value = (x.double() for x in inputs)
    return values_and_gradients(_attend, (query, key, value))


def exact_packed(inputs: Inputs, lengths: list[int]) -> list[Tensor]:
    """Return the same for packed sequences."""

    def attend(*whole: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths) for x in whole), strict=True)
        return torch.cat([_attend(*(x[:, None] for x in part))[:, 0] for part in parts])

    query, key, value = (x.double() for x in inputs)
    return values_and_gradients(attend, (query, key, value))


def errors(found: list[Tensor], reference: list[Tensor]) -> list[float]:
    return [
        float((one.double() - other).norm() / other.double().norm().clamp(min=1))
        for one, other in zip(found, reference, strict=True)
    ]


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / D**0.5
    is_later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(is_later, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)
