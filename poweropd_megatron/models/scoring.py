"""From the decoder's hidden states to log-probs and losses of chosen tokens, or to next logits.

All are output processors of GPTModel: they receive the last stage's hidden states and the output
weight.
Shapes: S positions, B sequences, N chosen tokens, H hidden, Vp columns of the vocabulary on this
rank.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from poweropd_megatron.objectives.loss import policy_gradient_loss
from poweropd_megatron.objectives.rewards import Reward
from poweropd_megatron.objectives.weights import TokenWeights
from poweropd_megatron.ops.fused_policy_gradient import PolicyGradient, fused_policy_gradient
from poweropd_megatron.ops.fused_vocabulary_gradient import (
    VocabularyGradient,
    fused_vocabulary_gradient,
)
from poweropd_megatron.ops.lm_head import materialized_logprob, recomputed_logprob, score
from poweropd_megatron.ops.lm_head_tiles import LMHead
from poweropd_megatron.ops.matmul import product
from poweropd_megatron.ops.vocabulary_objectives import VocabularyObjective


@dataclass(frozen=True, kw_only=True)
class ChosenTokens:
    """Which tokens of a batch are scored, each at the position that predicts it.

    Shapes: is_chosen_BS bool, True where the next token is scored; labels_BS int64, that token. The
    next token may lie on another rank: so both are of the positions before.
    """

    is_chosen_BS: Tensor
    labels_BS: Tensor
    vocab_size: int
    tp_group: dist.ProcessGroup
    logits_dtype: torch.dtype

    @property
    def labels_N(self) -> Tensor:
        """Return the chosen tokens, in row-major order."""
        return self.labels_BS[self.is_chosen_BS]


@dataclass(frozen=True, kw_only=True)
class RewardedTokens:
    """Which positions of a batch are trained on, and for what.

    weight: factors of the rewards; None where all are 1.
    Shapes: teacher_logp_N fp32, the chosen tokens' in row-major order.
    """

    chosen: ChosenTokens
    teacher_logp_N: Tensor
    reward: Reward
    head: Literal["fused", "recompute", "materialized"]
    weight: TokenWeights | None = None


@dataclass(frozen=True, kw_only=True)
class ComparedTokens:
    """At which positions of a batch the student's distribution is compared with the teacher's.

    Shapes: teacher_hidden_NG, the hidden states that predict the chosen tokens in row-major order,
    on the first tensor-parallel rank, which tells the others; teacher_weight_VpG this rank's rows
    of the teacher's output layer, on the last stage; weight_N fp32, by default 1 each.
    """

    chosen: ChosenTokens
    teacher_hidden_NG: Tensor | None
    teacher_weight_VpG: Tensor | None
    objective: VocabularyObjective
    weight_N: Tensor | None = None


def score_chosen(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    config: Any,
    context: ChosenTokens,
    **_: Any,
) -> Tensor:
    """Return the log-prob of each chosen token, [N], in row-major order of is_chosen_BS.

    Only the chosen positions are multiplied with the head, a tile of logits at a time.
    """
    hidden_NH, head = _chosen_hidden(hidden_states, output_layer, output_weight, config, context)
    return score(hidden_NH, head, context.labels_N).logp_N


def hidden_of_chosen(
    *,
    hidden_states: Tensor,
    config: Any,
    context: ChosenTokens,
    **_: Any,
) -> Tensor:
    """Return the hidden states from which the chosen tokens are predicted, [N, H], in row-major
    order of is_chosen_BS: what the head would be multiplied with. Without gradients."""
    return _gathered_hidden(hidden_states, config, context)


def policy_gradient_of_chosen(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    config: Any,
    context: RewardedTokens,
    **_: Any,
) -> PolicyGradient:
    """Return the policy-gradient loss of the chosen tokens, a sum, with what it is made of.

    Only the chosen positions are multiplied with the head. Backward gives the hidden states their
    gradient summed over the tensor-parallel ranks, as a column-parallel layer does.
    """
    chosen = context.chosen
    hidden_NH, head = _chosen_hidden(hidden_states, output_layer, output_weight, config, chosen)
    if context.head == "fused":
        return fused_policy_gradient(
            hidden_NH,
            head,
            chosen.labels_N,
            context.teacher_logp_N,
            context.reward,
            context.weight,
        )
    logprob = recomputed_logprob if context.head == "recompute" else materialized_logprob
    logp_N, entropy_N = logprob(hidden_NH, head, chosen.labels_N)
    reward_N = context.reward(context.teacher_logp_N, logp_N)
    if context.weight is not None:
        reward_N = context.weight(slice(None), logp_N) * reward_N
    return PolicyGradient(policy_gradient_loss(logp_N, reward_N), logp_N.detach(), entropy_N)


def vocabulary_gradient_of_chosen(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    config: Any,
    context: ComparedTokens,
    **_: Any,
) -> VocabularyGradient:
    """Return the objective over the vocabulary at the chosen tokens, a sum, and what it is made of.

    Cost beside the objective's: one broadcast of the teacher's hidden states over the
    tensor-parallel ranks. Gradients: as for policy_gradient_of_chosen.
    """
    chosen, weight_VpG = context.chosen, context.teacher_weight_VpG
    assert weight_VpG is not None
    hidden_NH, head = _chosen_hidden(hidden_states, output_layer, output_weight, config, chosen)
    teacher_NG = weight_VpG.new_empty(len(hidden_NH), weight_VpG.shape[1])
    if context.teacher_hidden_NG is not None:
        teacher_NG.copy_(context.teacher_hidden_NG)
    if dist.get_world_size(chosen.tp_group) > 1:
        dist.broadcast(teacher_NG, group=chosen.tp_group, group_src=0)
    teacher_head = replace(head, weight_VpH=weight_VpG)
    return fused_vocabulary_gradient(
        hidden_NH,
        head,
        teacher_NG,
        teacher_head,
        chosen.labels_N,
        context.objective,
        context.weight_N,
    )


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """The position of each row whose next token is wanted, [B]."""

    last_position_B: Tensor
    tp_group: dist.ProcessGroup
    logits_dtype: torch.dtype


def next_token_logits(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    config: Any,
    context: NextToken,
    **_: Any,
) -> Tensor:
    """Return this rank's logits of the token after each row's last position, [B, Vp]."""
    if config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=context.tp_group)
    batch = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    hidden_BH = hidden_states[context.last_position_B, batch]
    weight_VpH = output_layer.weight if output_weight is None else output_weight
    logits_BVp = hidden_BH.new_empty(len(hidden_BH), len(weight_VpH), dtype=context.logits_dtype)
    product(hidden_BH, weight_VpH.t(), out=logits_BVp)
    return logits_BVp


def _chosen_hidden(
    hidden_SBH: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    config: Any,
    chosen: ChosenTokens,
) -> tuple[Tensor, LMHead]:
    """Return the hidden states from which the chosen tokens are predicted, [N, H], and the head.

    Their gradient is summed over the tensor-parallel ranks: by a reduce-scatter where sequence
    parallelism cut them, else by an all-reduce.
    """
    hidden_NH = _gathered_hidden(hidden_SBH, config, chosen)
    if not config.sequence_parallel:
        hidden_NH = copy_to_tensor_model_parallel_region(hidden_NH, group=chosen.tp_group)
    head = LMHead(
        weight_VpH=output_layer.weight if output_weight is None else output_weight,
        vocab_size=chosen.vocab_size,
        tp_group=chosen.tp_group,
        logits_dtype=chosen.logits_dtype,
    )
    return hidden_NH, head


def _gathered_hidden(hidden_SBH: Tensor, config: Any, chosen: ChosenTokens) -> Tensor:
    if config.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=chosen.tp_group)
    return hidden_SBH.transpose(0, 1)[chosen.is_chosen_BS]
