"""Ways to causal grouped-query attention, of one long sequence or of many of different lengths.

`forward` is without autograd, as for scoring; `both` is forward and backward.
Shapes: S positions, B sequences, Hq query heads, Hk key heads, D channels a head, T tokens.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from logprob_cases import DTYPES, group_of_one
from torch import Tensor

HEADS = {"num_query_heads": 8, "num_key_heads": 4, "head_size": 128}
"""What a rank holds of Qwen3-1.7B's attention at TP 2."""
_CHECKED = 48
_TOLERANCE = {"bf16": 2e-2, "fp32": 1e-5}
"""Of the norm, against fp64."""


class Attention:
    """Attention of a query, key and value that take gradients."""

    def __init__(
        self,
        make: Callable[["Attention"], Callable[[], Tensor]],
        lengths: Sequence[int],
        dtype: str,
        device: str,
        is_packed: bool = False,
    ) -> None:
        """Build it for sequences of these lengths: right-padded [S, B, ...], or packed [T, ...]."""
        self.lengths, self.dtype, self.device = lengths, dtype, torch.device(device)
        shape = (sum(lengths),) if is_packed else (max(lengths), len(lengths))
        generator = torch.Generator(device).manual_seed(0)
        self.query, self.key, self.value = (
            torch.randn(*shape, heads, HEADS["head_size"], generator=generator, device=device)
            .to(DTYPES[dtype])
            .requires_grad_()
            for heads in (HEADS["num_query_heads"], *[HEADS["num_key_heads"]] * 2)
        )
        self._attend = make(self)
        attended = self._forward()
        self._gradient = torch.randn(attended.shape, generator=generator, device=device)
        self._gradient = self._gradient.to(attended.dtype)
        self._check(attended)
        self.steps = {"forward": self._forward, "both": self._both}

    def prepare(self) -> None:
        """Do nothing: the inputs stay as they are."""

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return self._attend()

    def _both(self) -> None:
        inputs = (self.query, self.key, self.value)
        torch.autograd.grad(self._attend(), inputs, self._gradient)

    @torch.no_grad()
    def _check(self, attended: Tensor) -> None:
        """Return if the first sequence begins as in fp64. Raises: ValueError if not."""
        count = min(_CHECKED, self.lengths[0])
        query, key, value = (
            x.unflatten(0, (-1, 1)).squeeze(1)[:count].reshape(count, -1, *x.shape[-2:])[:, 0]
            for x in (self.query, self.key, self.value)
        )
        groups = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
        scores = torch.einsum("shd,thd->hst", query.double(), key) / query.shape[2] ** 0.5
        is_later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(is_later, float("-inf")).softmax(dim=-1)
        exact = torch.einsum("hst,thd->shd", weights, value).flatten(1)
        found = attended[:count].reshape(count, -1, exact.shape[1])[:, 0]
        error = float((found.double() - exact).norm() / exact.norm())
        if not error <= _TOLERANCE[self.dtype]:
            raise ValueError(f"the attended values differ from those of fp64 by {error}")


def ours(case: Attention) -> Callable[[], Tensor]:
    """Return this project's core attention."""
    from poweropd_megatron.models.layers import SDPACoreAttention

    return partial(SDPACoreAttention(_config(case)), case.query, case.key, case.value)


def ours_packed(case: Attention) -> Callable[[], Tensor]:
    """Return this project's core attention of packed sequences."""
    from poweropd_megatron.models.packed import pack_params

    return partial(ours(case), packed_seq_params=pack_params(case.lengths))


def megatron(case: Attention) -> Callable[[], Tensor]:
    """Return Megatron-Core's DotProductAttention."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from poweropd_megatron.config.schema import ParallelConfig
    from poweropd_megatron.parallel import cpu_device
    from poweropd_megatron.parallel.layout import student_layout

    group_of_one(case.device.type)
    cpu_device.install()
    layout = student_layout(ParallelConfig(), case.device, seed=0)
    attention = DotProductAttention(
        _config(case), 1, AttnMaskType.causal, "self", pg_collection=layout.groups
    )
    length = case.query.shape[0]
    is_later = torch.ones(1, 1, length, length, dtype=torch.bool, device=case.device).triu(1)
    return partial(attention, case.query, case.key, case.value, is_later)


def _config(case: Attention):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HEADS["num_query_heads"] * HEADS["head_size"],
        num_attention_heads=HEADS["num_query_heads"],
        num_query_groups=HEADS["num_key_heads"],
        kv_channels=HEADS["head_size"],
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        params_dtype=DTYPES[case.dtype],
        bf16=case.dtype == "bf16",
    )


def rollout_lengths(count: int, longest: int) -> list[int]:
    """Return lengths like a rollout's: lognormal, most short, some cut off at the longest."""
    draw = random.Random(0)
    return [min(longest, int(longest / 8 * draw.lognormvariate(0, 1)) + 1) for _ in range(count)]
