"""What a row of a family's table is: one Megatron parameter and the tensors that it consists of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One Megatron parameter, where torch_dist stores it, and its Hugging Face tensors.

    In a table, names hold {layer} and {expert} where there is one of each; `at` fills them in.
    """

    megatron: str
    """Name in the module, where layers and experts are counted on their own rank."""
    stored: str
    """Key in a torch_dist checkpoint, where all layers are one tensor, and all experts."""
    hugging_face: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of the whole Hugging Face tensors, as config.json implies them."""
    stacked: tuple[Literal["layer", "expert"], ...] = ()
    """What the first dimensions of the stored tensor count."""
    dim: int | None = None
    """The dimension of the Hugging Face tensors that tensor parallelism cuts (None: not cut)."""
    num_query_groups: int | None = None
    """KV heads by which linear_qkv's rows are grouped: with more ranks than that, each holds a run
    of the merged rows of one group."""
    merge: Callable[[Sequence[Tensor]], Tensor] = lambda pieces: pieces[0]
    """Put Hugging Face tensors, or one rank's pieces of each, together as Megatron has them.

    It moves whole rows (of the first dimension) and nothing else, in an order that only depends on
    their number."""
    split: Callable[[Tensor], Sequence[Tensor]] = lambda whole: [whole]
    """The inverse of merge."""
    is_vocabulary: bool = False
    """Its rows are tokens; a model pads them to a multiple of TP, a checkpoint does not."""
    index: tuple[int, ...] = ()
    """Of a filled-in row: where in the first dimensions of the stored tensor it lies."""
    is_copy: bool = False
    """Another row's tensor once more: the last stage's copy of tied embeddings. Stored once."""

    @property
    def is_expert(self) -> bool:
        """Return whether it is held by one expert-parallel rank alone, and whole there."""
        return "expert" in self.stacked

    def ranks_per_piece(self, tp_size: int) -> int:
        """Return how many tensor-parallel ranks share one piece of each Hugging Face tensor."""
        return max(1, tp_size // (self.num_query_groups or tp_size))

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the whole merged parameter."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def at(
        self,
        *,
        layer: int = 0,
        expert: int = 0,
        local_layer: int | None = None,
        local_expert: int | None = None,
    ) -> "Weight":
        """Return the row of one layer and expert, which may have other numbers on their rank."""
        local_layer = layer if local_layer is None else local_layer
        local_expert = expert if local_expert is None else local_expert
        numbers = {"layer": layer, "expert": expert}
        return replace(
            self,
            megatron=self.megatron.format(layer=local_layer, expert=local_expert),
            hugging_face=tuple(
                name.format(layer=layer, expert=expert) for name in self.hugging_face
            ),
            index=tuple(numbers[name] for name in self.stacked),
        )


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a torch_dist checkpoint: a row of the table for all layers and experts.

    Its shape is [layers, experts, *weight.shape], without the dimensions that weight.stacked lacks.
    """

    weight: Weight
    num_layers: int
    num_experts: int

    @property
    def key(self) -> str:
        """Return its key in the checkpoint."""
        return self.weight.stored

    @property
    def stack(self) -> tuple[int, ...]:
        """Return the sizes of the first dimensions, which count layers and experts."""
        sizes = {"layer": self.num_layers, "expert": self.num_experts}
        return tuple(sizes[name] for name in self.weight.stacked)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its global shape."""
        return self.stack + self.weight.shape

    def parts(self) -> Iterator[tuple[tuple[int, ...], Weight]]:
        """Yield each index into the first dimensions, in order, and the row of what lies there.

        weight.merge makes stored[index] of the tensors weight.hugging_face; weight.split takes it
        apart again.
        """
        for index in product(*map(range, self.stack)):
            yield index, self.weight.at(**dict(zip(self.weight.stacked, index, strict=True)))
