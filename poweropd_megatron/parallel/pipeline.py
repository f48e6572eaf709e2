"""A forward without gradients through the pipeline stages of a model: rollouts and scoring."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from poweropd_megatron.parallel.layout import Layout


def forward_stage(
    chunks: Sequence[GPTModel],
    layout: Layout,
    token_ids_BS: Tensor,
    *,
    packed_seq_params: PackedSeqParams | None = None,
    output_processor: Callable[..., Any],
    context: Any,
) -> Any:
    """Return what the output processor makes of the hidden states; None off the last stage.

    Called by all ranks of a model copy with the same tokens. A stage goes on with its next call as
    soon as it has handed over its hidden states, so consecutive calls keep all stages busy; those
    of a virtual pipeline, which go round as many times as a stage has chunks, only in their last
    round.
    Shapes: token_ids_BS [B, S], with B 1 where packed_seq_params says which sequences lie in it.
    """
    batch_size, sequence_length = token_ids_BS.shape
    token_ids_BS = token_ids_BS.to(layout.device)
    output = None
    for chunk in chunks:
        config = chunk.config
        if not chunk.pre_process:
            length = sequence_length // (layout.tp_size if config.sequence_parallel else 1)
            received = torch.empty(
                (length, batch_size, config.hidden_size),
                dtype=config.pipeline_dtype,
                device=layout.device,
            )
            previous = (layout.pp_rank - 1) % layout.pp_size
            dist.recv(received, group=layout.groups.pp, group_src=previous)
            chunk.set_input_tensor(received)
        output = chunk(
            input_ids=token_ids_BS,
            position_ids=None,
            attention_mask=None,
            packed_seq_params=packed_seq_params,
            output_processor=output_processor,
            output_processor_context=context,
        )
        if not chunk.post_process:
            following = (layout.pp_rank + 1) % layout.pp_size
            dist.send(output.contiguous(), group=layout.groups.pp, group_dst=following)
    return output if layout.is_last_stage else None
