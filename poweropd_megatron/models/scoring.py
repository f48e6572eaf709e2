"""From the decoder's hidden states to log-probs of chosen tokens, or to the next's logits.

Both are output processors of GPTModel: they receive the last stage's hidden states and the output
weight.
Shapes: S positions, B sequences, N chosen tokens, H hidden, Vp columns of the vocabulary on this
rank.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import functional

from poweropd_megatron.ops.logprob import TokenLogprobs, vocab_parallel_logprob


@dataclass(frozen=True, kw_only=True)
class ChosenTokens:
    """Which positions of a batch are scored, on which label.

    Shapes: is_chosen_BS bool, True at the token that is scored (never at position 0);
    labels_BS int64, the token to score there. The token at position s is predicted from position s
    - 1.
    """

    is_chosen_BS: Tensor
    labels_BS: Tensor
    vocab_size: int
    tp_group: dist.ProcessGroup


def score_chosen(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    config: Any,
    context: ChosenTokens,
    **_: Any,
) -> TokenLogprobs:
    """Return the log-prob of each chosen token, [N], in row-major order of is_chosen_BS.

    Only the chosen positions are multiplied with the head.
    """
    hidden_BSH = _whole_sequence(hidden_states, config, context.tp_group)
    is_chosen = context.is_chosen_BS[:, 1:]
    logits_NVp = _logits(
        hidden_BSH[:, :-1][is_chosen], output_layer, output_weight, context.tp_group
    )
    return vocab_parallel_logprob(
        logits_NVp,
        context.labels_BS[:, 1:][is_chosen],
        vocab_size=context.vocab_size,
        tp_group=context.tp_group,
    )


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """The position of each row whose next token is wanted, [B]."""

    last_position_B: Tensor
    tp_group: dist.ProcessGroup


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
    hidden_BSH = _whole_sequence(hidden_states, config, context.tp_group)
    batch = context.last_position_B.new_tensor(range(hidden_BSH.shape[0]))
    hidden_BH = hidden_BSH[batch, context.last_position_B]
    return _logits(hidden_BH, output_layer, output_weight, context.tp_group)


def _whole_sequence(hidden_SBH: Tensor, config: Any, tp_group: dist.ProcessGroup) -> Tensor:
    """Return the hidden states as [B, S, H], gathered where sequence parallelism cut them."""
    if config.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(
            hidden_SBH, tensor_parallel_output_grad=False, group=tp_group
        )
    return hidden_SBH.transpose(0, 1)


def _logits(
    hidden_NH: Tensor, output_layer: Any, output_weight: Tensor | None, tp_group: dist.ProcessGroup
) -> Tensor:
    """Return [N, Vp]; backward sums the hidden gradient as a column-parallel layer does."""
    weight_VpH = output_layer.weight if output_weight is None else output_weight
    hidden_NH = copy_to_tensor_model_parallel_region(hidden_NH, group=tp_group)
    return functional.linear(hidden_NH, weight_VpH)
