"""The forward and the loss of one micro-batch, as Megatron's schedules ask for them.

Shapes: B sequences, T tokens, N tokens of a micro-batch in the loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from poweropd_megatron.models.scoring import RewardedTokens, policy_gradient_of_chosen
from poweropd_megatron.objectives.labels import Labels
from poweropd_megatron.objectives.rewards import Reward
from poweropd_megatron.objectives.weights import TokenWeights
from poweropd_megatron.ops.fused_policy_gradient import PolicyGradient
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.train.microbatches import MicroBatch

MicroBatchResult = tuple[MicroBatch, PolicyGradient]


@dataclass(frozen=True, kw_only=True)
class ForwardStep:
    """What the student is trained on in an optimizer step, micro-batch by micro-batch.

    weights: factors of the rewards, [B, T] each; None where all are 1.
    """

    layout: Layout
    vocab_size: int
    logits_dtype: torch.dtype
    head: Literal["fused", "recompute", "materialized"]
    labels: Labels
    teacher_logp_BT: Tensor
    reward: Reward
    weights: TokenWeights | None

    def __call__(
        self, micro_batches: Iterator[MicroBatch], ddp: DistributedDataParallel
    ) -> tuple[Any, Any]:
        """Return the model's output of the next micro-batch, and its loss function.

        The sum of the losses is divided by the sum of the token counts, by Megatron, once.
        """
        micro_batch = next(micro_batches)
        device = self.layout.device

        def of_tokens(whole_BT: Tensor) -> Tensor:
            return micro_batch.cut(whole_BT)[micro_batch.mask_RS].to(device)

        output = ddp(
            input_ids=micro_batch.token_ids_RS.to(device),
            position_ids=None,
            attention_mask=None,
            packed_seq_params=micro_batch.packed_seq_params,
            output_processor=policy_gradient_of_chosen,
            output_processor_context=RewardedTokens(
                chosen=micro_batch.chosen(
                    self.labels.student_BT,
                    vocab_size=self.vocab_size,
                    tp_group=self.layout.groups.tp,
                    logits_dtype=self.logits_dtype,
                    device=device,
                ),
                teacher_logp_N=of_tokens(self.teacher_logp_BT),
                reward=self.reward,
                weight=None if self.weights is None else self.weights.map(of_tokens),
                head=self.head,
            ),
        )

        def loss(result: PolicyGradient) -> tuple[Tensor, Tensor, MicroBatchResult]:
            num_tokens = torch.tensor(
                len(result.logp_N), dtype=torch.int, device=result.logp_N.device
            )
            return result.loss, num_tokens, (micro_batch, result)

        return output, loss
