"""A forward without gradients through the pipeline stages of a model: rollouts and scoring."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from poweropd_megatron.parallel.layout import Layout


def forward_stage(
    chunk: GPTModel,
    layout: Layout,
    token_ids_BS: Tensor,
    *,
    packed_seq_params: PackedSeqParams | None = None,
    output_processor: Callable[..., Any],
    context: Any,
) -> Any:
    """Return what the output processor makes of the hidden states; None off the last stage.

    Called by all ranks of a model copy with the same tokens. A stage goes on with its next call as
    soon as it has handed over its hidden states, so consecutive calls keep all stages busy.
    Shapes: token_ids_BS [B, S], with B 1 where packed_seq_params says which sequences lie in it.
    """
    batch_size, sequence_length = token_ids_BS.shape
    config = chunk.config
    if not layout.is_first_stage:
        length = sequence_length // (layout.tp_size if config.sequence_parallel else 1)
        received = torch.empty(
            (length, batch_size, config.hidden_size),
            dtype=config.pipeline_dtype,
            device=layout.device,
        )
        dist.recv(received, group=layout.groups.pp, group_src=layout.pp_rank - 1)
        chunk.set_input_tensor(received)
    output = chunk(
        input_ids=token_ids_BS.to(layout.device),
        position_ids=None,
        attention_mask=None,
        packed_seq_params=packed_seq_params,
        output_processor=output_processor,
        output_processor_context=context,
    )
    if layout.is_last_stage:
        return output
    dist.send(output.contiguous(), group=layout.groups.pp, group_dst=layout.pp_rank + 1)
    return None
