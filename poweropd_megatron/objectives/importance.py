"""Importance ratios: how likely the student is to draw a token, against what drew it.

Shapes: B sequences, T tokens, N tokens in the loss, [...] any.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poweropd_megatron.config.objective import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class ImportanceRatio:
    """p_S / p_behaviour, held constant and truncated to [low, high].

    With a token drawn from another distribution, ratio * reward * grad log p_S has the expectation
    that reward * grad log p_S has with tokens of the student's. That is the gradient of ratio *
    reward, too: holding the ratio constant as a factor of log p_S, and differentiating it without
    log p_S, are the same where nothing is truncated. Where it is, this one keeps the token's
    gradient, with a bounded factor; differentiating would drop it.
    level: "token" takes each token's own ratio, and leaves that the tokens before it were drawn
    from another distribution, too; "sequence" takes the product over the sequence's tokens in the
    loss, which is exact and varies much more.
    Source: truncated importance sampling (Ionides 2008); as a constant factor in CISPO
    (arXiv 2506.13585).
    """

    level: Literal["token", "sequence"]
    low: float
    high: float

    def truncated(self, log_ratio: Tensor) -> Tensor:
        """Return exp(log_ratio) held to [low, high]. Shapes: [...]."""
        return log_ratio.exp().clamp(self.low, self.high)


def build_importance_ratio(objective: ObjectiveConfig) -> ImportanceRatio | None:
    """Return the ratio that the settings ask for; None if rewards are not weighed by one."""
    if objective.importance_ratio == "none":
        return None
    return ImportanceRatio(
        level=objective.importance_ratio, low=objective.ratio_low, high=objective.ratio_high
    )


def log_ratios(logp: Tensor, behaviour_logp: Tensor, is_drawn: Tensor) -> Tensor:
    """Return log p_S - log p_behaviour of each token that was drawn and is in the loss, else 0.

    is_drawn leaves out labels that were not drawn: the teacher's EOS of terminal = 'im_end'.
    Shapes: all [...].
    """
    return torch.where(is_drawn, logp - behaviour_logp, 0.0)


def of_sequences(log_ratio_BT: Tensor) -> Tensor:
    """Return the log of the product of each sequence's ratios, [B, 1]."""
    return log_ratio_BT.double().sum(dim=1, keepdim=True).float()


def importance_metrics(
    log_ratio_BT: Tensor, is_drawn_BT: Tensor, ratio: ImportanceRatio
) -> dict[str, float]:
    """Return importance/{mean,min,max,effective_sample_size,clipped_fraction}, before truncation.

    Each is over tokens, or over sequences with tokens for level "sequence". The effective sample
    size is (sum w)^2 / (count sum w^2), the share of the samples that as many equally weighed ones
    would be; the clipped fraction is the share that lies outside [low, high].
    """
    if ratio.level == "sequence":
        log_ratio_N = of_sequences(log_ratio_BT)[is_drawn_BT.any(dim=1), 0].double()
    else:
        log_ratio_N = log_ratio_BT[is_drawn_BT].double()
    if not len(log_ratio_N):
        names = ("mean", "min", "max", "effective_sample_size", "clipped_fraction")
        return {f"importance/{name}": 0.0 for name in names}
    ratio_N = log_ratio_N.exp()
    relative_N = (log_ratio_N - log_ratio_N.max()).exp()
    size = relative_N.sum().square() / (len(relative_N) * relative_N.square().sum())
    is_clipped_N = (ratio_N < ratio.low) | (ratio_N > ratio.high)
    return {
        "importance/mean": ratio_N.mean().item(),
        "importance/min": ratio_N.min().item(),
        "importance/max": ratio_N.max().item(),
        "importance/effective_sample_size": size.item(),
        "importance/clipped_fraction": is_clipped_N.double().mean().item(),
    }
