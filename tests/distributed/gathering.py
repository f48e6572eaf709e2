"""A model's tensors, or the gradients that its ranks share, put together from all ranks."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from poweropd_megatron.models.build import layer_numbers
from poweropd_megatron.models.families import weights_of
from poweropd_megatron.models.hf_weights import to_hugging_face
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.parallel.layout import Layout


def whole_tensors(
    chunks: Sequence[GPTModel],
    layout: Layout,
    model: ModelConfig,
    value_of: Callable[[Any], Tensor],
) -> dict[str, list[Tensor]]:
    """Return every copy of each tensor under its Hugging Face name, put together from all ranks.

    Under "padding": the rows beyond the vocabulary. Ranks without the model get nothing.
    """
    if not layout.holds_model:
        return {"padding": []}
    rows = [
        (weights[name], parameter)
        for chunk in chunks
        for weights in [
            {
                weight.megatron: weight
                for weight in weights_of(
                    model, layer_numbers(chunk), ep_rank=layout.ep_rank, ep_size=layout.ep_size
                )
            }
        ]
        for name, parameter in chunk.named_parameters()
    ]
    own: list[tuple[str, Tensor]] = []
    for weight, parameter in rows:
        value = value_of(parameter).detach().clone()
        if weight.is_expert:
            own += to_hugging_face(weight, [value], vocab_size=model.vocab_size)
            continue
        shards = [torch.empty_like(value) for _ in range(layout.tp_size)]
        dist.all_gather(shards, value, group=layout.groups.tp)
        copies = [[shard] for shard in shards] if weight.dim is None else [shards]
        for copy in copies:
            own += to_hugging_face(weight, copy, vocab_size=model.vocab_size)
        if weight.is_vocabulary:
            own.append(("padding", torch.cat(shards)[model.vocab_size :]))
    group = dist.new_group(list(layout.ranks), use_local_synchronization=True)
    by_rank: list[list[tuple[str, Tensor]]] = [[] for _ in layout.ranks]
    dist.all_gather_object(by_rank, own, group=group)
    whole: dict[str, list[Tensor]] = {}
    for name, tensor in (named for named_tensors in by_rank for named in named_tensors):
        whole.setdefault(name, []).append(tensor)
    return whole


def gather_shares(buffers: Iterable[list[Any]], dp_group: dist.ProcessGroup) -> None:
    """Complete the gradients, of which the distributed optimizer leaves each rank a share."""
    for buffer in chain.from_iterable(buffers):
        for bucket in buffer.buckets:
            shares = list(bucket.grad_data.chunk(dist.get_world_size(dp_group)))
            dist.all_gather(shares, shares[dist.get_rank(dp_group)].clone(), group=dp_group)
