"""LM head, log-prob, reward and gradients in one visit of each token.

Shapes: N tokens, n of a chunk, H hidden, Vp columns of the vocabulary on this rank (padding
included).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd_megatron.objectives.loss import policy_gradient_loss
from poweropd_megatron.ops.arguments import check_fp32
from poweropd_megatron.ops.backends import IGNORED_TARGET, kernels_for
from poweropd_megatron.ops.gradient_in_forward import gradient_in_forward
from poweropd_megatron.ops.lm_head_tiles import Gradients, LMHead, logit_chunks, token_chunks


class PolicyGradient(NamedTuple):
    """The loss of some tokens and what it is made of."""

    loss: Tensor
    """- sum of reward * log p_S, a differentiable scalar."""
    logp_N: Tensor
    """fp32, detached."""
    entropy_N: Tensor
    """fp32, in nats, detached."""


Reward = Callable[[Tensor, Tensor], Tensor]
"""(teacher_logp_n, student_logp_n) -> reward_n, for any part of the tokens."""
Weight = Callable[[slice, Tensor], Tensor]
"""(rows, student_logp_n) -> weight_n, for these rows of the tokens."""


def fused_policy_gradient(
    hidden_NH: Tensor,
    head: LMHead,
    targets_N: Tensor,
    teacher_logp_N: Tensor,
    reward: Reward,
    weight: Weight | None = None,
) -> PolicyGradient:
    """Return - sum of weight * reward * log p_S over the tokens; the gradients are made on the way.

    Reward and weight (1 unless given) have to be of each token by itself, and are held constant.
    Each chunk of tokens is visited once: its logits, their softmax, the rewards, the gradient over
    the logits, the shares of the gradients. With a `main_grad` on the weight these are added to it
    here, so the loss must be differentiated exactly once, with an upstream gradient of 1. That is
    asserted in backward, when main_grad has been written; a reward that raises in a later chunk
    leaves main_grad with the chunks before it. Either way, zero main_grad before going on.
    The gradient of hidden_NH is this rank's share, as for any column-parallel layer. Rows that are
    ignored are multiplied like the others, so NaN in their hidden states would reach the weight's
    gradient: leave them out.
    Shapes: hidden_NH [N, H], targets_N [N] int64 in [0, vocab_size) or -100 (no part of the loss),
    teacher_logp_N [N] fp32.
    Memory: CHUNK_BYTES of logits, and an fp32 copy of hidden_NH's gradient.
    Cost: three GEMMs; one all_gather of 16 bytes a token in each chunk.
    Raises: ValueError naming the tensor that doesn't fit.
    """
    head.check(hidden_NH, targets_N)
    check_fp32("teacher_logp_N", teacher_logp_N, targets_N.shape, targets_N.device)
    logp_N = hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32)
    entropy_N = torch.zeros_like(logp_N)

    def visit(grads: Gradients | None) -> Tensor:
        kernels = kernels_for(hidden_NH)
        loss = logp_N.new_zeros(())
        for rows, logits in logit_chunks(hidden_NH, head, token_chunks(hidden_NH, head), grads):
            targets = targets_N[rows]
            stats = kernels.row_stats(
                logits, targets, first_column=head.first_column, vocab_size=head.vocab_size
            )
            softmax = head.combine(stats, targets, with_entropy=True)
            reward_n = reward(teacher_logp_N[rows], softmax.logp_N)
            check_fp32("what reward returns", reward_n, targets.shape, targets.device)
            if weight is not None:
                weight_n = weight(rows, softmax.logp_N)
                check_fp32("what weight returns", weight_n, targets.shape, targets.device)
                reward_n = weight_n * reward_n
            reward_n = torch.where(targets == IGNORED_TARGET, 0.0, reward_n)
            loss += policy_gradient_loss(softmax.logp_N, reward_n)
            assert softmax.entropy_N is not None
            logp_N[rows], entropy_N[rows] = softmax.logp_N, softmax.entropy_N
            if grads is not None:
                kernels.row_grad_(
                    logits,
                    targets,
                    maximum_N=softmax.maximum_N,
                    inverse_sum_N=softmax.inverse_sum_N,
                    grad_N=-reward_n,
                    first_column=head.first_column,
                    vocab_size=head.vocab_size,
                )
        return loss

    targets_N, teacher_logp_N = targets_N.contiguous(), teacher_logp_N.contiguous()
    loss = gradient_in_forward(hidden_NH, head.weight_VpH, visit)
    return PolicyGradient(loss, logp_N, entropy_N)
