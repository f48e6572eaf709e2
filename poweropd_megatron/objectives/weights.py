"""Factors of the rewards: the loss's normalization and importance ratios.

Shapes: B sequences, T tokens; [...] any, such as [N] for the tokens of a micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poweropd_megatron.objectives.importance import ImportanceRatio, log_ratios, of_sequences
from poweropd_megatron.objectives.labels import Labels, drawn
from poweropd_megatron.objectives.normalization import LossNormalization, loss_weights
from poweropd_megatron.rollout.trajectories import Trajectories


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """What the reward of each token is multiplied with, detached.

    scale: what is known before the forward (normalization, ratios of sequences). ratio: of tokens,
    which depends on the log-probs of the forward that is differentiated; behaviour_logp and
    is_drawn are there for it alone.
    Shapes: all tensors alike.
    """

    scale: Tensor
    ratio: ImportanceRatio | None = None
    behaviour_logp: Tensor | None = None
    is_drawn: Tensor | None = None

    @classmethod
    def scaled(cls, weights: "TokenWeights | None", factor: Tensor) -> "TokenWeights":
        """Return these weights, 1 for None, times a factor of each token. Shape: the weights'."""
        if weights is None:
            return cls(scale=factor)
        return replace(weights, scale=weights.scale * factor)

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenWeights":
        """Return these weights with each tensor changed, such as cut to a micro-batch."""
        return TokenWeights(
            scale=change(self.scale),
            ratio=self.ratio,
            behaviour_logp=None if self.behaviour_logp is None else change(self.behaviour_logp),
            is_drawn=None if self.is_drawn is None else change(self.is_drawn),
        )

    def __call__(self, part: slice, student_logp: Tensor) -> Tensor:
        """Return the factors of a part of the tokens, whose log-probs these are."""
        if self.ratio is None:
            return self.scale[part]
        assert self.behaviour_logp is not None
        assert self.is_drawn is not None
        log_ratio = log_ratios(
            student_logp.detach(), self.behaviour_logp[part], self.is_drawn[part]
        )
        return self.scale[part] * self.ratio.truncated(log_ratio)


def weigh_tokens(
    trajectories: Trajectories,
    labels: Labels,
    *,
    normalization: LossNormalization,
    micro_batches: Sequence[Sequence[int]],
    ratio: ImportanceRatio | None,
    score: Callable[[Trajectories, Labels], Tensor],
) -> TokenWeights | None:
    """Return the factors of an optimizer step's rewards, [B, T] each; None where all are 1.

    micro_batches: the sequences' numbers in each, on all data-parallel ranks. score returns the
    student's log-probs before the step, [B, T]: it is called for ratios of sequences alone.
    """
    scale_B = loss_weights(labels.mask_BT, normalization, micro_batches)
    if scale_B is None and ratio is None:
        return None
    scale_BT = torch.ones(labels.mask_BT.shape)
    if scale_B is not None:
        scale_BT *= scale_B[:, None]
    if ratio is None:
        return TokenWeights(scale=scale_BT)
    behaviour_logp_BT, is_drawn_BT = trajectories.behaviour_logp_BT, drawn(trajectories, labels)
    if ratio.level == "token":
        return TokenWeights(
            scale=scale_BT, ratio=ratio, behaviour_logp=behaviour_logp_BT, is_drawn=is_drawn_BT
        )
    log_ratio_BT = log_ratios(score(trajectories, labels), behaviour_logp_BT, is_drawn_BT)
    return TokenWeights(scale=scale_BT * ratio.truncated(of_sequences(log_ratio_BT)))
