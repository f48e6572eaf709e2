"""Drawing tokens: temperature, top-k, nucleus, and random numbers that no layout changes.

Shapes: B sequences, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn. Temperature 0 takes the most likely token."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Draw(NamedTuple):
    """One token per row."""

    token_B: Tensor
    """int64."""
    logp_B: Tensor
    """fp32 log-prob of the token under the distribution it was drawn from."""
    truncated_mass_B: Tensor
    """fp32 probability that top-k and top-p removed."""


def uniforms(*, seed: int, stream: tuple[int, ...], sequence: int, count: int) -> np.ndarray:
    """Return `count` fp64 numbers in [0, 1) that depend on nothing but the arguments.

    Token t of a sequence is drawn with number t, whichever rank, micro-batch or layout draws it.
    """
    return np.random.default_rng((seed, *stream, sequence)).random(count)


def draw_tokens(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Draw:
    """Return a token for each row by inverting the cumulative distribution at its uniform number.

    Shapes: logits_BV [B, V] in any float dtype, without padding columns; uniform_B [B] fp64.
    Order of the filters: temperature, top-k, then top-p of what top-k left, renormalised.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        logp_BV = logits_BV.log_softmax(dim=1)
        logp_B, token_B = logp_BV.max(dim=1)
        return Draw(token_B, logp_B, torch.zeros_like(logp_B))
    probs_BV = (logits_BV / sampling.temperature).softmax(dim=1)
    if sampling.top_k == 0 and sampling.top_p == 1:
        token_B = _invert(probs_BV, uniform_B)
        logp_B = probs_BV.gather(1, token_B[:, None])[:, 0].log()
        return Draw(token_B, logp_B, torch.zeros_like(logp_B))
    kept_Bk, order_Bk = _likeliest(probs_BV, sampling.top_k)
    if sampling.top_p < 1:
        before_Bk = kept_Bk.cumsum(dim=1, dtype=torch.float64) - kept_Bk
        is_out_Bk = before_Bk >= sampling.top_p * kept_Bk.sum(dim=1, dtype=torch.float64)[:, None]
        is_out_Bk[:, 0] = False
        kept_Bk = kept_Bk.masked_fill(is_out_Bk, 0)
    mass_B = kept_Bk.sum(dim=1)
    rank_B = _invert(kept_Bk, uniform_B)
    logp_B = (kept_Bk.gather(1, rank_B[:, None])[:, 0] / mass_B).log()
    token_B = order_Bk.gather(1, rank_B[:, None])[:, 0]
    return Draw(token_B, logp_B, (1 - mass_B).clamp(min=0))


def _likeliest(probs_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest probabilities of each row, all for 0, and their tokens.

    In descending order; of equal ones the first tokens come first, and are the ones that stay.
    """
    if not 0 < count < probs_BV.shape[1]:
        sorted_BV, order_BV = probs_BV.sort(dim=1, descending=True, stable=True)
        return sorted_BV, order_BV
    # A stable sort of the whole vocabulary takes several times as long.
    smallest_B1 = probs_BV.topk(count, dim=1).values[:, -1:]
    is_larger_BV = probs_BV > smallest_B1
    is_equal_BV = ~(is_larger_BV | (probs_BV < smallest_B1))  # as all are, of NaN
    room_B1 = count - is_larger_BV.sum(dim=1, keepdim=True)
    is_kept_BV = is_larger_BV | (is_equal_BV & (is_equal_BV.cumsum(dim=1) <= room_B1))
    tokens_Bk = is_kept_BV.nonzero()[:, 1].view(-1, count)
    sorted_Bk, order_Bk = probs_BV.gather(1, tokens_Bk).sort(dim=1, descending=True, stable=True)
    return sorted_Bk, tokens_Bk.gather(1, order_Bk)


def _invert(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the first column whose cumulative probability exceeds the uniform share of the total.

    A column of probability zero is never returned: the cumulative sum doesn't rise there. For NaN,
    which no column exceeds, it is the last.
    """
    cumulative_BV = probs_BV.cumsum(dim=1, dtype=torch.float64)
    total_B = cumulative_BV[:, -1]
    below_total_B = torch.nextafter(total_B, torch.zeros_like(total_B))
    target_B = torch.minimum(uniform_B.to(total_B.device) * total_B, below_total_B)
    column_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    return column_B.clamp(max=probs_BV.shape[1] - 1)
