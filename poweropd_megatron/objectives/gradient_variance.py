"""How much of a gradient is noise: from one more, in which half of the signs are turned.

The gradient is a sum over prompts, G = sum_i g_i (with the division by the batch's tokens in each
g_i). Were other prompts drawn, it would be another one; for independent prompts, and the token
count held fixed, its variance, the trace of its covariance, is estimated by

    V = P / (P - 1) * sum_i |g_i - G / P|^2

over the P prompts. That would take the P gradients, one by one. But D = sum_i s_i g_i, with a
random half of the signs s_i +1 and the other half -1, has E |D|^2 = V over the choices of halves:
E s_i s_j = -1 / (P - 1) for two prompts, so that

    E |D|^2 = sum_i |g_i|^2 - sum_{i != j} g_i . g_j / (P - 1) = V

One such D is enough where many directions are at work, as in networks: |D|^2 then varies little.
D comes out of the same forward and backward as G, with each prompt's rewards times its sign, and
its norm out of the same reduction: whatever the layout, with no buffer beside the gradient's own.
Shapes: P prompts, B sequences.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def balanced_signs(num_prompts: int, seed: tuple[int, ...]) -> Tensor:
    """Return +1 for a random half of the prompts and -1 for the others, [P] fp32.

    Of an odd number one is left out, with 0. The same seed gives the same signs on every rank.
    """
    signs_P = np.resize(np.array([1.0, -1.0], dtype=np.float32), num_prompts)
    if num_prompts % 2:
        signs_P[-1] = 0.0
    return torch.from_numpy(np.random.default_rng(seed).permutation(signs_P))


@dataclass(frozen=True, kw_only=True)
class PromptSigns:
    """The signs of a batch's prompts, each of which has num_samples consecutive sequences."""

    signs_P: Tensor
    num_samples: int

    @classmethod
    def draw(cls, num_sequences: int, num_samples: int, seed: tuple[int, ...]) -> "PromptSigns":
        """Return balanced signs for the prompts of a batch."""
        signs_P = balanced_signs(num_sequences // num_samples, seed)
        return cls(signs_P=signs_P, num_samples=num_samples)

    @property
    def signs_B(self) -> Tensor:
        """Return the sign of each sequence."""
        return self.signs_P.repeat_interleave(self.num_samples)

    def metrics(self, signed_norm: float, grad_norm: float) -> dict[str, float]:
        """Return the metrics of gradients with and without the signs, see variance_metrics."""
        return variance_metrics(signed_norm, grad_norm, len(self.signs_P))


def variance_metrics(signed_norm: float, grad_norm: float, num_prompts: int) -> dict[str, float]:
    """Return grad_variance and grad_variance_fraction, its share of the squared gradient norm.

    signed_norm is |D| with balanced_signs, grad_norm is |G|; neither is clipped. With an odd number
    of prompts E |D|^2 = V (P - 1) / P, for which is made up. As E |G|^2 is V more than the squared
    norm of the gradient's mean, a fraction near 1 says that steps are noise; by chance it may be
    larger. It is left out where the gradient is 0.
    """
    variance = signed_norm**2
    if num_prompts % 2:
        variance *= num_prompts / (num_prompts - 1)
    fraction = {"grad_variance_fraction": variance / grad_norm**2} if grad_norm else {}
    return {"grad_variance": variance, **fraction}
