"""Qwen3 weights, Hugging Face <-> Megatron: one table, read in both directions.

A row says which Hugging Face tensors make up one Megatron parameter, along which of their
dimensions tensor parallelism cuts them, and how the cut pieces are put together. Reading and
writing touch one parameter at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.hf_folder import HFFolder
from poweropd_megatron.models.qwen3 import Qwen3Config


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors that it consists of.

    dim is the dimension of the Hugging Face tensors that tensor parallelism cuts (None:
    not cut); merge and split turn the cut Hugging Face pieces into the Megatron shard and back.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    dim: int | None = None
    merge: Callable[[Sequence[Tensor]], Tensor] = lambda pieces: pieces[0]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda shard: [shard]
    is_vocabulary: bool = False
    is_expert: bool = False
    """Held by the ranks of one expert-parallel rank alone, and whole there."""


def layer_weights(
    config: Qwen3Config, layer: int, *, local_layer: int, ep_rank: int, ep_size: int
) -> Iterator[Weight]:
    """Yield the rows of one transformer layer; `local_layer` is its number on its pipeline stage.

    Of its experts only those that the expert-parallel rank holds.

    Source: megatron/core/models/gpt/gpt_layer_specs.py (names),
    megatron/core/transformer/attention.py (rows of linear_qkv: for each KV head its query heads,
    then its key, then its value).
    """
    ours, theirs = f"decoder.layers.{local_layer}.", f"model.layers.{layer}."
    width = config.kv_channels
    queries_per_group = config.num_attention_heads // config.num_query_groups

    def merge_qkv(pieces: Sequence[Tensor]) -> Tensor:
        query, key, value = (
            piece.reshape(-1, rows, piece.shape[-1])
            for piece, rows in zip(pieces, _rows, strict=True)
        )
        return torch.cat([query, key, value], dim=1).flatten(0, 1)

    def split_qkv(shard: Tensor) -> Sequence[Tensor]:
        grouped = shard.reshape(-1, sum(_rows), shard.shape[-1])
        return [part.flatten(0, 1) for part in torch.split(grouped, _rows, dim=1)]

    _rows = [queries_per_group * width, width, width]
    attention = theirs + "self_attn."
    yield Weight(
        megatron=ours + "input_layernorm.weight",
        hugging_face=(theirs + "input_layernorm.weight",),
    )
    yield Weight(
        megatron=ours + "self_attention.linear_qkv.weight",
        hugging_face=tuple(f"{attention}{name}_proj.weight" for name in "qkv"),
        dim=0,
        merge=merge_qkv,
        split=split_qkv,
    )
    for name in "qk":
        yield Weight(
            megatron=f"{ours}self_attention.{name}_layernorm.weight",
            hugging_face=(f"{attention}{name}_norm.weight",),
        )
    yield Weight(
        megatron=ours + "self_attention.linear_proj.weight",
        hugging_face=(attention + "o_proj.weight",),
        dim=1,
    )
    yield Weight(
        megatron=ours + "pre_mlp_layernorm.weight",
        hugging_face=(theirs + "post_attention_layernorm.weight",),
    )
    if config.experts is None:
        yield from _mlp_weights(ours + "mlp.", theirs + "mlp.", is_expert=False)
        return
    yield Weight(
        megatron=ours + "mlp.router.weight",
        hugging_face=(theirs + "mlp.gate.weight",),
    )
    num_local_experts = config.experts.num_moe_experts // ep_size
    for local_expert in range(num_local_experts):
        yield from _mlp_weights(
            f"{ours}mlp.experts.local_experts.{local_expert}.",
            f"{theirs}mlp.experts.{ep_rank * num_local_experts + local_expert}.",
            is_expert=True,
        )


def _mlp_weights(ours: str, theirs: str, *, is_expert: bool) -> Iterator[Weight]:
    """Yield the rows of one gated MLP; tensor parallelism leaves an expert's whole."""
    yield Weight(
        megatron=ours + "linear_fc1.weight",
        hugging_face=(theirs + "gate_proj.weight", theirs + "up_proj.weight"),
        dim=None if is_expert else 0,
        merge=lambda pieces: torch.cat(list(pieces)),
        split=lambda shard: shard.chunk(2),
        is_expert=is_expert,
    )
    yield Weight(
        megatron=ours + "linear_fc2.weight",
        hugging_face=(theirs + "down_proj.weight",),
        dim=None if is_expert else 1,
        is_expert=is_expert,
    )


def outer_weights(config: Qwen3Config) -> Iterator[Weight]:
    """Yield the rows outside the layers.

    With tied embeddings the last pipeline stage holds its own copy of them as output_layer.weight.
    """
    embedding = "model.embed_tokens.weight"
    yield Weight(
        megatron="embedding.word_embeddings.weight",
        hugging_face=(embedding,),
        dim=0,
        is_vocabulary=True,
    )
    yield Weight(megatron="decoder.final_layernorm.weight", hugging_face=("model.norm.weight",))
    yield Weight(
        megatron="output_layer.weight",
        hugging_face=(embedding if config.tie_word_embeddings else "lm_head.weight",),
        dim=0,
        is_vocabulary=True,
    )


def weights_of(
    config: Qwen3Config, layer_numbers: Sequence[int], *, ep_rank: int = 0, ep_size: int = 1
) -> Iterator[Weight]:
    """Yield the rows of a pipeline stage that holds these layers (counted from 0, in order)."""
    yield from outer_weights(config)
    for local_layer, layer in enumerate(layer_numbers):
        yield from layer_weights(
            config, layer, local_layer=local_layer, ep_rank=ep_rank, ep_size=ep_size
        )


def load(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    weights: Iterable[Weight],
    folder: HFFolder,
    *,
    vocab_size: int,
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
        pieces = [
            _read_piece(folder, source, weight, vocab_size, tp_rank, tp_size)
            for source in weight.hugging_face
        ]
        try:
            shard = weight.merge(pieces)
        except RuntimeError:
            shapes = ", ".join(f"{source} {folder.shape(source)}" for source in weight.hugging_face)
            raise InputError(f"{folder.setting}: {shapes} don't fit config.json") from None
        if weight.is_vocabulary and shard.shape[0] < parameter.shape[0]:
            padding = shard.new_zeros(parameter.shape[0] - shard.shape[0], *shard.shape[1:])
            shard = torch.cat([shard, padding])
        if shard.shape != parameter.shape:
            raise InputError(
                f"{folder.setting}: {' + '.join(weight.hugging_face)} gives {name} the shape "
                f"{tuple(shard.shape)}, but config.json implies {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(shard)


def _read_piece(
    folder: HFFolder, name: str, weight: Weight, vocab_size: int, tp_rank: int, tp_size: int
) -> Tensor:
    if weight.dim is None:
        whole: Tensor = folder.read(name)
        return whole
    shape = folder.shape(name)
    if len(shape) != 2 or (weight.is_vocabulary and shape[0] != vocab_size):
        expected = f"{vocab_size} rows" if weight.is_vocabulary else "two dimensions"
        raise InputError(
            f"{folder.setting}: {name} has the shape {shape}, but config.json implies {expected}"
        )
    size = shape[weight.dim]
    share = -(-size // tp_size)
    start = min(tp_rank * share, size)
    length = min(share, size - start)
    piece: Tensor = folder.read(name, dim=weight.dim, start=start, length=length)
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
