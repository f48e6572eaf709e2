"""The forward and the loss of one micro-batch, as Megatron's schedules ask for them.

Shapes: B sequences, T tokens, N tokens of a micro-batch in the loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from poweropd_megatron.models.scoring import (
    ChosenTokens,
    ComparedTokens,
    RewardedTokens,
    policy_gradient_of_chosen,
    vocabulary_gradient_of_chosen,
)
from poweropd_megatron.objectives.labels import Labels
from poweropd_megatron.objectives.rewards import Reward
from poweropd_megatron.objectives.weights import TokenWeights
from poweropd_megatron.ops.fused_policy_gradient import PolicyGradient
from poweropd_megatron.ops.fused_vocabulary_gradient import VocabularyGradient
from poweropd_megatron.ops.vocabulary_objectives import VocabularyObjective
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.train.microbatches import MicroBatch
from poweropd_megatron.train.teacher_hidden import Handed

MicroBatchResult = tuple[MicroBatch, PolicyGradient | VocabularyGradient]


@dataclass(frozen=True, kw_only=True)
class ForwardStep(ABC):
    """What the student is trained on in an optimizer step, micro-batch by micro-batch.

    weights: factors of the tokens' losses, [B, T] each; None where all are 1.
    """

    layout: Layout
    vocab_size: int
    logits_dtype: torch.dtype
    labels: Labels
    weights: TokenWeights | None

    def __call__(
        self, micro_batches: Iterator[MicroBatch], ddp: DistributedDataParallel
    ) -> tuple[Any, Any]:
        """Return the model's output of the next micro-batch, and its loss function.

        The sum of the losses is divided by the sum of the token counts, by Megatron, once.
        """
        micro_batch = next(micro_batches)
        chosen = micro_batch.chosen(
            self.labels.student_BT,
            vocab_size=self.vocab_size,
            tp_group=self.layout.groups.tp,
            logits_dtype=self.logits_dtype,
            device=self.layout.device,
        )
        output_processor, context = self.learn(micro_batch, chosen)
        output = ddp(
            input_ids=micro_batch.token_ids_RS.to(self.layout.device),
            position_ids=None,
            attention_mask=None,
            packed_seq_params=micro_batch.packed_seq_params,
            output_processor=output_processor,
            output_processor_context=context,
        )

        def loss(
            result: PolicyGradient | VocabularyGradient,
        ) -> tuple[Tensor, Tensor, MicroBatchResult]:
            num_tokens = torch.tensor(
                len(result.logp_N), dtype=torch.int, device=result.logp_N.device
            )
            return result.loss, num_tokens, (micro_batch, result)

        return output, loss

    @abstractmethod
    def learn(
        self, micro_batch: MicroBatch, chosen: ChosenTokens
    ) -> tuple[Callable[..., Any], Any]:
        """Return the output processor that makes the loss, and its context."""

    def of_tokens(self, micro_batch: MicroBatch, whole_BT: Tensor) -> Tensor:
        """Return the values of a micro-batch's tokens in the loss, [N], on the device."""
        return micro_batch.cut(whole_BT)[micro_batch.mask_RS].to(self.layout.device)


@dataclass(frozen=True, kw_only=True)
class RewardStep(ForwardStep):
    """Rewards of drawn tokens."""

    head: Literal["fused", "recompute", "materialized"]
    teacher_logp_BT: Tensor
    reward: Reward

    def learn(
        self, micro_batch: MicroBatch, chosen: ChosenTokens
    ) -> tuple[Callable[..., Any], Any]:
        """Return the policy gradient's output processor, and what it needs."""
        weights = self.weights
        if weights is not None:
            weights = weights.map(lambda whole_BT: self.of_tokens(micro_batch, whole_BT))
        return policy_gradient_of_chosen, RewardedTokens(
            chosen=chosen,
            teacher_logp_N=self.of_tokens(micro_batch, self.teacher_logp_BT),
            reward=self.reward,
            weight=weights,
            head=self.head,
        )


@dataclass(frozen=True, kw_only=True)
class ComparisonStep(ForwardStep):
    """An objective over the whole vocabulary. teacher_head: see ComparedTokens."""

    objective: VocabularyObjective
    teacher_hidden: Handed
    teacher_head: Tensor | None

    def learn(
        self, micro_batch: MicroBatch, chosen: ChosenTokens
    ) -> tuple[Callable[..., Any], Any]:
        """Return the comparison's output processor, and what it needs."""
        weight_N = None
        if self.weights is not None:
            weight_N = self.of_tokens(micro_batch, self.weights.scale)
        return vocabulary_gradient_of_chosen, ComparedTokens(
            chosen=chosen,
            teacher_hidden_NG=self.teacher_hidden.of(micro_batch)
            if self.layout.speaks_for_model
            else None,
            teacher_weight_VpG=self.teacher_head,
            objective=self.objective,
            weight_N=weight_N,
        )


def build_forward_step(
    teacher: Tensor | Handed,
    reward: Reward,
    objective: VocabularyObjective | None,
    teacher_head: Tensor | None,
    *,
    head: Literal["fused", "recompute", "materialized"],
    **common: Any,
) -> ForwardStep:
    """Return the step that learns from what the teacher says: log-probs, or hidden states.

    common: the fields of ForwardStep.
    """
    if isinstance(teacher, Tensor):
        return RewardStep(head=head, teacher_logp_BT=teacher, reward=reward, **common)
    assert objective is not None
    return ComparisonStep(
        objective=objective, teacher_hidden=teacher, teacher_head=teacher_head, **common
    )
