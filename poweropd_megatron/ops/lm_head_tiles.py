"""The output layer's shard, its logits tile by tile, and the sums of its gradients.

Shapes: N tokens, H hidden, Vp columns of the vocabulary on this rank (padding included).
"""

from collections.abc import Iterator
from dataclasses import dataclass

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
CHUNK_BYTES = {"cpu": 160 << 20, "cuda": 2 << 30}
"""Logits of the tokens that are visited at a time: whole rows of a rank's columns, padding not
counted. The weight's
gradient is read and written once a chunk, which a GPU's memory feels sooner."""
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

    def add(self, rows: slice, columns: slice, grad_logits: Tensor) -> None:
        """Add what a tile of the logits' gradient gives."""
        if grad_logits.is_cuda:
            # Once, for both products: tensor cores want operands of one type.
            grad_logits = grad_logits.to(self._weight_VpH.dtype)
        add_product_(self._sum_NH[rows], grad_logits, self._weight_VpH[columns])
        if self._sum_VpH is not None:
            add_product_(self._sum_VpH[columns], grad_logits.t(), self._hidden_NH[rows])

    def add_chunk(self, rows: slice, grad_logits: Tensor) -> None:
        """Add what the logits' gradient of a chunk of tokens gives, over all columns."""
        for columns in product_tiles(self._weight_VpH, rows):
            self.add(rows, columns, grad_logits[:, columns])

    def hidden(self) -> Tensor:
        """Return the hidden states' gradient, in their dtype."""
        return self._sum_NH.to(self._hidden_NH.dtype)

    def weight(self) -> Tensor | None:
        """Return the weight's gradient, in its dtype; None where main_grad has it, or if frozen."""
        if self._sum_VpH is None or self.adds_to_main_grad:
            return None
        return self._sum_VpH.to(self._weight_VpH.dtype)


def logit_tiles(hidden_NH: Tensor, head: LMHead) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, columns, logits) over all tiles; each overwrites the one before."""
    weight_VpH = head.weight_VpH
    row_tiles = even_slices(len(hidden_NH), TILE_ROWS[hidden_NH.device.type])
    for columns in column_tiles(weight_VpH, row_tiles[0] if row_tiles else slice(0, 0)):
        weight = weight_VpH[columns]
        if is_widened(weight) and head.logits_dtype == torch.float32:
            weight = weight.to(torch.float32)
        for rows in row_tiles:
            logits = hidden_NH.new_empty(
                rows.stop - rows.start, len(weight), dtype=head.logits_dtype
            )
            product(hidden_NH[rows], weight.t(), out=logits)
            yield rows, columns, logits


def token_chunks(hidden_NH: Tensor, head: LMHead, *, num_models: int = 1) -> list[slice]:
    """Return slices of the tokens whose logits, those of num_models together, fit in CHUNK_BYTES.

    They depend on what is the same on all ranks of the head, which have to have the same chunks.
    """
    num_ranks = dist.get_world_size(head.tp_group)
    row_bytes = num_models * -(-head.vocab_size // num_ranks) * head.logits_dtype.itemsize
    return even_slices(len(hidden_NH), CHUNK_BYTES[hidden_NH.device.type] // row_bytes)


def chunk_buffer(hidden_NH: Tensor, head: LMHead, chunks: list[slice]) -> Tensor:
    """Return room for the logits of the longest of the chunks, [n, Vp] in the logits' dtype."""
    longest = chunks[0].stop if chunks else 0
    return hidden_NH.new_empty(longest, len(head.weight_VpH), dtype=head.logits_dtype)


def chunk_logits(hidden_NH: Tensor, head: LMHead, rows: slice, buffer: Tensor) -> Tensor:
    """Return the logits of a chunk of tokens, [n, Vp], written to the buffer."""
    logits = buffer[: rows.stop - rows.start]
    for columns in product_tiles(head.weight_VpH, rows):
        product(hidden_NH[rows], head.weight_VpH[columns].t(), out=logits[:, columns])
    return logits


def product_tiles(weight_VpH: Tensor, rows: slice) -> list[slice]:
    """Return the columns to be multiplied at a time: all, unless their weights are widened."""
    return column_tiles(weight_VpH, rows) if is_widened(weight_VpH) else [slice(0, len(weight_VpH))]


def column_tiles(weight_VpH: Tensor, rows: slice) -> list[slice]:
    """Return slices of the columns whose logits for these rows take at most TILE_BYTES in fp32.

    So do their weights, where they are widened: few rows would else widen all of the weight.
    """
    num_columns, hidden_size = weight_VpH.shape
    height = max(1, rows.stop - rows.start)
    if is_widened(weight_VpH):
        height = max(height, hidden_size)
    width = TILE_BYTES[weight_VpH.device.type] // (4 * height)
    return even_slices(num_columns, width, multiple=_COLUMN_MULTIPLE)


def is_widened(weight_VpH: Tensor) -> bool:
    """Return whether a CPU multiplies with an fp32 copy of the weight, for fp32 results."""
    return weight_VpH.dtype != torch.float32 and not weight_VpH.is_cuda


def even_slices(total: int, longest: int, *, multiple: int = 1) -> list[slice]:
    """Return the fewest slices of at most `longest`, about equal, that cover 0 to `total`.

    Their lengths are multiples of `multiple`, but for the last; at least one each.
    """
    count = -(-total // max(longest, multiple))
    length = -(-total // (max(count, 1) * multiple)) * multiple
    return [slice(begin, min(begin + length, total)) for begin in range(0, total, max(length, 1))]
