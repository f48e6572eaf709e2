"""Causal grouped-query attention by torch's kernels: rows laid out alike, or of variable lengths.

Queries may be fewer than keys: they are then the last positions, so that the last query sees all.
Shapes: B sequences, Hq query heads and Hk key heads, S queries of a sequence, D channels a head, T
tokens.
"""

import inspect
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

_VARLEN_HAS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Older releases of torch have variable lengths without grouped queries."""


def attend_causally(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
    """Return the attended values, [B, Hq, S, D], of rows that are laid out alike.

    With fewer queries than keys torch's CPU and fp32 kernels need the mask: it is made once for all
    layers, and is a tensor of queries times keys.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = (
        None
        if num_queries == num_keys
        else _lower_right_mask(num_queries, num_keys, query.dtype, query.device)
    )
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend_varlen(
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
    """Return the attended values, [T, Hq, D], of sequences that lie end to end.

    Needs has_varlen_kernel. The boundaries, int32, start at 0 and end with the tokens; the kernel
    aligns the last query of a sequence with its last key.
    """
    attended_THD: Tensor = varlen_attn(  # type: ignore[assignment]
        query,
        key,
        value,
        boundaries_q,
        boundaries_k,
        longest_q,
        longest_k,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended_THD


def has_varlen_kernel(query: Tensor) -> bool:
    """Return whether torch has flash attention of variable lengths for a query like this."""
    return (
        _VARLEN_HAS_GROUPS
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@lru_cache(maxsize=4)
def _lower_right_mask(
    num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return what is added to scores: 0 where the last queries may look, else -infinity."""
    mask = torch.full((num_queries, num_keys), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(1 + num_keys - num_queries)
