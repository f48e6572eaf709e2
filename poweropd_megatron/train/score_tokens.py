"""Log-probs of a batch from a forward that keeps nothing. Shapes: B sequences, T tokens."""

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from poweropd_megatron.models.scoring import score_chosen
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.pipeline import forward_stage
from poweropd_megatron.train.microbatches import MicroBatch


@torch.no_grad()
def score_tokens(
    chunks: Sequence[GPTModel],
    layout: Layout,
    micro_batches: Sequence[MicroBatch],
    labels_BT: Tensor,
    *,
    vocab_size: int,
    logits_dtype: torch.dtype,
) -> Tensor:
    """Return the log-prob of each label in the loss of these micro-batches, [B, T]; 0 elsewhere.

    Called by all ranks of a model copy with their micro-batches. Off the last pipeline stage, all
    are 0. Shapes: labels_BT of the whole batch; the result fp32 on the CPU.
    Cost: a forward; one all_gather of 16 bytes a token over the tensor-parallel ranks.
    """
    logp_BT = torch.zeros(labels_BT.shape)
    for micro_batch in micro_batches:
        logp_N = forward_stage(
            chunks,
            layout,
            micro_batch.token_ids_RS,
            packed_seq_params=micro_batch.packed_seq_params,
            output_processor=score_chosen,
            context=micro_batch.chosen(
                labels_BT,
                vocab_size=vocab_size,
                tp_group=layout.groups.tp,
                logits_dtype=logits_dtype,
                device=layout.device,
            ),
        )
        if logp_N is not None:
            micro_batch.put(logp_BT, logp_N)
    return logp_BT
