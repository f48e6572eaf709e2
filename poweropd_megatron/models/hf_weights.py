"""A model's shards out of a folder and back to Hugging Face, by its family's table of weights.

Reading and writing touch one parameter at a time.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families.weight import Weight
from poweropd_megatron.models.weight_source import WeightSource


def load(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    weights: Iterable[Weight],
    source: WeightSource,
    *,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Fill a pipeline stage's parameters with its shards of a folder's tensors.

    One parameter at a time is read; rows that pad the vocabulary are zero.
    Raises: InputError if a tensor has another shape or holds NaN, or a parameter has no row in the
    table.
    """
    row_of = {weight.megatron: weight for weight in weights}
    for name, parameter in parameters:
        if name not in row_of:
            raise InputError(f"{source.setting}: no Hugging Face tensor is known for {name}")
        weight = row_of[name]
        sharing = weight.ranks_per_piece(tp_size)
        pieces = source.read_pieces(weight, tp_rank=tp_rank // sharing, tp_size=tp_size // sharing)
        shard = weight.merge(pieces).chunk(sharing)[tp_rank % sharing]
        if weight.is_vocabulary and shard.shape[0] < parameter.shape[0]:
            padding = shard.new_zeros(parameter.shape[0] - shard.shape[0], *shard.shape[1:])
            shard = torch.cat([shard, padding])
        assert shard.shape == parameter.shape, name
        with torch.no_grad():
            parameter.copy_(shard)
        if parameter.isnan().any():
            raise InputError(f"{source.setting}: {' + '.join(weight.hugging_face)} has NaN in it")


def to_hugging_face(
    weight: Weight, shards: Sequence[Tensor], *, vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of a parameter, given its shards in tensor-parallel order."""
    if weight.dim is None:
        yield from zip(weight.hugging_face, weight.split(shards[0]), strict=True)
        return
    sharing = weight.ranks_per_piece(len(shards))
    merged = [torch.cat(list(shards[i : i + sharing])) for i in range(0, len(shards), sharing)]
    pieces_by_shard = [weight.split(whole) for whole in merged]
    for name, pieces in zip(weight.hugging_face, zip(*pieces_by_shard, strict=True), strict=True):
        whole = torch.cat(list(pieces), dim=weight.dim)
        yield name, whole[:vocab_size] if weight.is_vocabulary else whole
