"""The compiled kernels (csrc/) behind the interface of the plain torch reference."""

from typing import Any

import torch
from torch import Tensor

from poweropd_megatron.ops.backends import Softmaxes
from poweropd_megatron.ops.rewards import REWARD_KINDS


class CompiledRows:
    """The kernels of one compiled module, poweropd_megatron.ops._cpu or ._cuda."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def row_stats(
        self,
        logits_NVp: Tensor,
        targets_N: Tensor,
        *,
        first_column: int,
        vocab_size: int,
        with_entropy: bool = True,
        stats_N4: Tensor | None = None,
    ) -> Tensor:
        """Return the states of the rows; see ops.rows.row_stats."""
        accumulate = stats_N4 is not None
        if stats_N4 is None:
            stats_N4 = _fp32((len(targets_N), 4), logits_NVp)
        columns = num_valid_columns(logits_NVp, first_column, vocab_size)
        self.module.row_stats(
            logits_NVp, targets_N, stats_N4, first_column, columns, with_entropy, accumulate
        )
        # Autograd would else miss that a tensor was written which it may have kept.
        torch.autograd.graph.increment_version(stats_N4)
        return stats_N4

    def combine(
        self, stats_RN4: Tensor, targets_N: Tensor, *, with_entropy: bool = True
    ) -> Softmaxes:
        """Return the rows' softmaxes; see ops.rows.combine."""
        shape = tuple(targets_N.shape)
        result = Softmaxes(
            logp_N=_fp32(shape, stats_RN4),
            entropy_N=_fp32(shape, stats_RN4) if with_entropy else None,
            maximum_N=_fp32(shape, stats_RN4),
            inverse_sum_N=_fp32(shape, stats_RN4),
        )
        self.module.combine(stats_RN4, targets_N, *result)
        return result

    def token_reward(
        self,
        kind: str,
        teacher_logp_N: Tensor,
        student_logp_N: Tensor,
        *,
        a: float = 0.0,
        b: float = 0.0,
    ) -> Tensor:
        """Return the rewards; see ops.rewards.token_reward."""
        reward_N = torch.empty_like(student_logp_N)
        self.module.token_reward(
            REWARD_KINDS.index(kind), teacher_logp_N, student_logp_N, a, b, reward_N
        )
        return reward_N

    def row_grad_(
        self,
        logits_NVp: Tensor,
        targets_N: Tensor,
        *,
        maximum_N: Tensor,
        inverse_sum_N: Tensor,
        grad_N: Tensor,
        first_column: int,
        vocab_size: int,
    ) -> None:
        """Write the gradient over the logits; see ops.rows.row_grad_."""
        columns = num_valid_columns(logits_NVp, first_column, vocab_size)
        self.module.row_grad(
            logits_NVp, targets_N, maximum_N, inverse_sum_N, grad_N, first_column, columns
        )
        torch.autograd.graph.increment_version(logits_NVp)


def num_valid_columns(logits_NVp: Tensor, first_column: int, vocab_size: int) -> int:
    """Return how many of a shard's columns are of the vocabulary; the others are padding."""
    return min(max(vocab_size - first_column, 0), logits_NVp.shape[1])


def _fp32(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
