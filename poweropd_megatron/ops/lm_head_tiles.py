"""The output layer's shard, its logits tile by tile, and the sums of its gradients.

Shapes: N tokens, H hidden, Vp columns of the vocabulary on this rank (padding included).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from poweropd_megatron.ops.arguments import check_dense, check_integer
from poweropd_megatron.ops.backends import Softmaxes
from poweropd_megatron.ops.logprob import combine_over_ranks
from poweropd_megatron.ops.matmul import add_product_, product
from poweropd_megatron.ops.rows import LOGIT_DTYPES, check_targets

TILE_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Logits, in fp32, of a tile: a CPU's stay near its cache, a GPU wants large products."""
TILE_ROWS = {"cpu": 2048, "cuda": 8192}
CHUNK_BYTES = {"cpu": 168 << 20, "cuda": 2 << 30}
"""Logits of the tokens that are visited at a time: whole rows of a rank's columns, padding not
counted. The weight's gradient is read and written once a chunk, which a GPU's memory feels sooner.
"""
WIDENED_CHUNK = 1.2
"""Times as many where the weight has to be widened, which happens once a chunk, too."""
_COLUMN_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True)
class LMHead:
    """A rank's share of the output layer."""

    weight_VpH: Tensor
    """[Vp, H] fp32 or bf16. Where it has Megatron's `main_grad` in fp32, its gradient is added to
    that and nothing is left for autograd."""
    vocab_size: int
    """Tokens of the whole vocabulary; columns from there on are padding."""
    tp_group: dist.ProcessGroup
    logits_dtype: torch.dtype = torch.float32
    """fp32, or the weight's own. bf16 logits alone cost about a tenth of the reward in noise."""

    @property
    def first_column(self) -> int:
        """Return the token of this rank's first column."""
        return dist.get_rank(self.tp_group) * len(self.weight_VpH)

    def check(self, hidden_NH: Tensor, targets_N: Tensor) -> None:
        """Return if these fit the head. Raises: ValueError naming what doesn't."""
        weight = self.weight_VpH
        check_dense("weight_VpH", weight)
        check_dense("hidden_NH", hidden_NH)
        check_integer("vocab_size", self.vocab_size, least=1)
        if weight.dim() != 2 or weight.dtype not in LOGIT_DTYPES:
            raise ValueError(
                f"weight_VpH must be [Vp, H] fp32 or bf16, got {tuple(weight.shape)} {weight.dtype}"
            )
        if hidden_NH.dim() != 2 or hidden_NH.shape[1] != weight.shape[1]:
            raise ValueError(
                f"hidden_NH must be [N, {weight.shape[1]}], got {tuple(hidden_NH.shape)}"
            )
        if hidden_NH.dtype != weight.dtype or hidden_NH.device != weight.device:
            raise ValueError(
                f"hidden_NH is {hidden_NH.dtype} on {hidden_NH.device}, weight_VpH {weight.dtype} "
                f"on {weight.device}: they must be alike"
            )
        if self.logits_dtype not in (torch.float32, weight.dtype):
            raise ValueError(
                f"logits_dtype must be fp32 or the weight's {weight.dtype}, got {self.logits_dtype}"
            )
        check_targets(targets_N, len(hidden_NH), hidden_NH.device, vocab_size=self.vocab_size)
        _check_main_grad(weight)

    def combine(self, stats_N4: Tensor, targets_N: Tensor, *, with_entropy: bool) -> Softmaxes:
        """Return the softmaxes of rows from all ranks' states; see logprob.combine_over_ranks."""
        return combine_over_ranks(
            stats_N4,
            targets_N,
            self.tp_group,
            num_columns=len(self.weight_VpH),
            vocab_size=self.vocab_size,
            with_entropy=with_entropy,
        )


def _check_main_grad(weight_VpH: Tensor) -> None:
    main_grad = getattr(weight_VpH, "main_grad", None)
    if main_grad is None:
        return
    name = "main_grad of weight_VpH"
    check_dense(name, main_grad)
    if main_grad.shape != weight_VpH.shape:
        raise ValueError(f"{name} must be {list(weight_VpH.shape)}, got {tuple(main_grad.shape)}")
    if main_grad.dtype not in LOGIT_DTYPES:
        raise ValueError(f"{name} must be fp32 or bf16, got {main_grad.dtype}")
    if main_grad.device != weight_VpH.device:
        raise ValueError(f"{name} is on {main_grad.device}, expected {weight_VpH.device}")


class Tile(NamedTuple):
    """Some tokens' logits in some columns, [n, v], and what they are the product of."""

    rows: slice
    columns: slice
    hidden: Tensor
    """[n, H]."""
    weight: Tensor
    """[v, H]; of both, widened copies where the product needs them."""
    logits: Tensor


class Gradients:
    """fp32 sums of the gradients of hidden states and weight, over tiles of logits."""

    def __init__(self, hidden_NH: Tensor, weight_VpH: Tensor) -> None:
        """Start at zero, or where the weight's `main_grad` is. A frozen weight has no gradient."""
        self._hidden_NH, self._weight_VpH = hidden_NH, weight_VpH
        main_grad: Tensor | None = getattr(weight_VpH, "main_grad", None)
        is_trained = weight_VpH.requires_grad
        self.adds_to_main_grad = (
            is_trained and main_grad is not None and main_grad.dtype == torch.float32
        )
        self._sum_VpH = main_grad if self.adds_to_main_grad else None
        if is_trained and self._sum_VpH is None:
            self._sum_VpH = torch.zeros_like(weight_VpH, dtype=torch.float32)
        self._sum_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)

    def add(self, tile: Tile) -> None:
        """Add what a tile gives, whose logits have been overwritten by their gradient."""
        grad_logits = tile.logits
        if grad_logits.is_cuda:
            # Once, for both products: tensor cores want operands of one type.
            grad_logits = grad_logits.to(self._weight_VpH.dtype)
        add_product_(self._sum_NH[tile.rows], grad_logits, tile.weight)
        if self._sum_VpH is not None:
            add_product_(self._sum_VpH[tile.columns], grad_logits.t(), tile.hidden)

    def hidden(self) -> Tensor:
        """Return the hidden states' gradient, in their dtype."""
        return self._sum_NH.to(self._hidden_NH.dtype)

    def weight(self) -> Tensor | None:
        """Return the weight's gradient, in its dtype; None where main_grad has it, or if frozen."""
        if self._sum_VpH is None or self.adds_to_main_grad:
            return None
        return self._sum_VpH.to(self._weight_VpH.dtype)


def logit_tiles(hidden_NH: Tensor, head: LMHead) -> Iterator[Tile]:
    """Yield all tiles; the logits of each overwrite those before."""
    row_tiles = even_slices(len(hidden_NH), TILE_ROWS[hidden_NH.device.type])
    tallest = row_tiles[0] if row_tiles else slice(0, 0)
    tiles = column_tiles(head.weight_VpH, tallest)
    widest = tiles[0].stop if tiles else 0
    room = hidden_NH.new_empty(tallest.stop * widest, dtype=head.logits_dtype)
    for columns, weight in _operands(head, tiles):
        for rows in row_tiles:
            hidden = _operand(hidden_NH[rows], head)
            logits = room[: len(hidden) * len(weight)].view(len(hidden), len(weight))
            product(hidden, weight.t(), out=logits)
            yield Tile(rows, columns, hidden, weight, logits)


def logit_chunks(
    hidden_NH: Tensor, head: LMHead, chunks: Sequence[slice], grads: Gradients | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, logits) of chunks of whole rows, each in the place of the one before.

    chunks: those of token_chunks. grads: what is left in the logits when the next chunk is asked
    for is taken for their gradient, and what it gives is added to them.
    Between two chunks each tile of the weight has its turn once, for the gradients of one and for
    the logits of the next: where it has to be widened, that is half the work.
    """
    longest = chunks[0].stop if chunks else 0
    buffer = hidden_NH.new_empty(longest, len(head.weight_VpH), dtype=head.logits_dtype)
    tiles = [slice(0, len(head.weight_VpH))]
    if _is_widened(head.weight_VpH):
        tiles = column_tiles(head.weight_VpH, slice(0, longest))
    before: tuple[slice, Tensor] | None = None
    for rows in (*chunks, None):
        if rows is None and grads is None:
            return
        after = None if rows is None else (rows, _operand(hidden_NH[rows], head))
        for columns, weight in _operands(head, tiles):
            if before is not None and grads is not None:
                logits = buffer[: len(before[1]), columns]
                grads.add(Tile(before[0], columns, before[1], weight, logits))
            if after is not None:
                product(after[1], weight.t(), out=buffer[: len(after[1]), columns])
        if after is not None:
            yield after[0], buffer[: len(after[1])]
        before = after


def _operands(head: LMHead, tiles: list[slice]) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, weight) of tiles, the weight as the products of this head take it: a widened
    one in the place of the one before."""
    weight_VpH = head.weight_VpH
    room_vH: Tensor | None = None
    if _is_widened(weight_VpH) and tiles:
        widest = tiles[0].stop
        room_vH = weight_VpH.new_empty(widest, weight_VpH.shape[1], dtype=head.logits_dtype)
    for columns in tiles:
        weight = weight_VpH[columns]
        yield columns, weight if room_vH is None else room_vH[: len(weight)].copy_(weight)


def _operand(hidden: Tensor, head: LMHead) -> Tensor:
    """Return hidden states as the products of this head take them."""
    return hidden.to(head.logits_dtype) if _is_widened(hidden) else hidden


def token_chunks(hidden_NH: Tensor, *heads: LMHead) -> list[slice]:
    """Return slices of the tokens whose logits, those of all heads together, fit in CHUNK_BYTES.

    They depend on what is the same on all ranks of a head, which have to have the same chunks.
    """
    row_bytes = sum(
        -(-head.vocab_size // dist.get_world_size(head.tp_group)) * head.logits_dtype.itemsize
        for head in heads
    )
    most_bytes = CHUNK_BYTES[hidden_NH.device.type]
    if all(_is_widened(head.weight_VpH) for head in heads):
        most_bytes = int(WIDENED_CHUNK * most_bytes)
    return even_slices(len(hidden_NH), most_bytes // row_bytes)


def column_tiles(weight_VpH: Tensor, rows: slice) -> list[slice]:
    """Return slices of the columns whose logits for these rows take at most TILE_BYTES in fp32.

    So do their weights, where they are widened: few rows would else widen all of the weight.
    """
    num_columns, hidden_size = weight_VpH.shape
    height = max(1, rows.stop - rows.start)
    if _is_widened(weight_VpH):
        height = max(height, hidden_size)
    width = TILE_BYTES[weight_VpH.device.type] // (4 * height)
    return even_slices(num_columns, width, multiple=_COLUMN_MULTIPLE)


def _is_widened(tensor: Tensor) -> bool:
    """Return whether a CPU multiplies with an fp32 copy of this, for fp32 results."""
    return tensor.dtype != torch.float32 and not tensor.is_cuda


def even_slices(total: int, longest: int, *, multiple: int = 1) -> list[slice]:
    """Return the fewest slices of at most `longest`, about equal, that cover 0 to `total`.

    Their lengths are multiples of `multiple`, but for the last; they are made longer by less than
    that to be so, and are at least one each.
    """
    count = -(-total // max(longest, multiple))
    length = -(-total // (max(count, 1) * multiple)) * multiple
    return [slice(begin, min(begin + length, total)) for begin in range(0, total, max(length, 1))]
