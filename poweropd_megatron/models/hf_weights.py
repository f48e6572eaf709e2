"""A model's shards out of a Hugging Face folder and back, by its family's table of weights.

Reading and writing touch one parameter at a time.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families.weight import Weight
from poweropd_megatron.models.hf_folder import HFFolder


def load(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    weights: Iterable[Weight],
    folder: HFFolder,
    *,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Fill a pipeline stage's parameters with its shards of a folder's tensors.

    Only the slices that this rank holds are read, one parameter at a time; rows that pad the
    vocabulary are zero.
    Raises: InputError if a tensor is missing, has another shape, or a parameter has no row in the
    table.
    """
    row_of = {weight.megatron: weight for weight in weights}
    for name, parameter in parameters:
        if name not in row_of:
            raise InputError(f"{folder.setting}: no Hugging Face tensor is known for {name}")
        weight = row_of[name]
        shard = weight.merge(
            [
                _read_piece(folder, source, shape, weight.dim, tp_rank, tp_size)
                for source, shape in zip(weight.hugging_face, weight.shapes, strict=True)
            ]
        )
        if weight.is_vocabulary and shard.shape[0] < parameter.shape[0]:
            padding = shard.new_zeros(parameter.shape[0] - shard.shape[0], *shard.shape[1:])
            shard = torch.cat([shard, padding])
        assert shard.shape == parameter.shape, name
        with torch.no_grad():
            parameter.copy_(shard)


def _read_piece(
    folder: HFFolder,
    name: str,
    expected: tuple[int, ...],
    dim: int | None,
    tp_rank: int,
    tp_size: int,
) -> Tensor:
    shape = folder.shape(name)
    if shape != expected:
        raise InputError(
            f"{folder.setting}: {name} has the shape {shape}, but config.json implies {expected}"
        )
    if dim is None:
        whole: Tensor = folder.read(name)
        return whole
    size = shape[dim]
    share = -(-size // tp_size)
    start = min(tp_rank * share, size)
    piece: Tensor = folder.read(name, dim=dim, start=start, length=min(share, size - start))
    return piece


def to_hugging_face(
    weight: Weight, shards: Sequence[Tensor], *, vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of a parameter, given its shards in tensor-parallel order."""
    if weight.dim is None:
        yield from zip(weight.hugging_face, weight.split(shards[0]), strict=True)
        return
    pieces_by_shard = [weight.split(shard) for shard in shards]
    for name, pieces in zip(weight.hugging_face, zip(*pieces_by_shard, strict=True), strict=True):
        whole = torch.cat(list(pieces), dim=weight.dim)
        yield name, whole[:vocab_size] if weight.is_vocabulary else whole
