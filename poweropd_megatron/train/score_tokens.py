"""Log-probs of a batch from a forward that keeps nothing. Shapes: B sequences, T tokens."""

from collections.abc import Callable, Iterator, Sequence

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
    outputs = outputs_of(
        chunks,
        layout,
        micro_batches,
        labels_BT,
        score_chosen,
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
    )
    for micro_batch, logp_N in outputs:
        if logp_N is not None:
            micro_batch.put(logp_BT, logp_N)
    return logp_BT


def outputs_of(
    chunks: Sequence[GPTModel],
    layout: Layout,
    micro_batches: Sequence[MicroBatch],
    labels_BT: Tensor,
    output_processor: Callable[..., Tensor],
    *,
    vocab_size: int,
    logits_dtype: torch.dtype,
) -> Iterator[tuple[MicroBatch, Tensor | None]]:
    """Yield each micro-batch, and what the processor makes of its tokens in the loss; None off the
    last pipeline stage. To be used up under torch.no_grad by all ranks of a model copy.
    """
    for micro_batch in micro_batches:
        yield (
            micro_batch,
            forward_stage(
                chunks,
                layout,
                micro_batch.token_ids_RS,
                packed_seq_params=micro_batch.packed_seq_params,
                output_processor=output_processor,
                context=micro_batch.chosen(
                    labels_BT,
                    vocab_size=vocab_size,
                    tp_group=layout.groups.tp,
                    logits_dtype=logits_dtype,
                    device=layout.device,
                ),
            ),
        )
