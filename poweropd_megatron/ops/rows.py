"""Row kernels over logits that tensor parallelism cut along the vocabulary.

One pass makes a state of each row of a shard, the states of all shards make a softmax, and one
pass writes the gradient over the logits.
Shapes: N rows, Vp columns of the vocabulary on this rank (padding included), R ranks.
"""

import torch
from torch import Tensor

from poweropd_megatron.ops.arguments import check_dense, check_fp32, check_integer, check_writable
from poweropd_megatron.ops.backends import IGNORED_TARGET, Softmaxes, kernels_for

LOGIT_DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def row_stats(
    logits_NVp: Tensor,
    targets_N: Tensor,
    *,
    first_column: int,
    vocab_size: int,
    with_entropy: bool = True,
    stats_N4: Tensor | None = None,
) -> Tensor:
    """Return the state of each row of a shard, [N, 4] fp32.

    A state is {m, s, z, t}: m the largest logit, s the sum of e^(logit - m), z the target's logit
    or -inf if another shard has it, t the sum weighted with logit - m (0 unless with_entropy). With
    stats_N4, which is written and returned, the columns join those that it has seen: a vocabulary
    may be visited in tiles.

    Shapes: logits_NVp [N, Vp] fp32 or bf16, unit stride along the columns; column j is token
    first_column + j, and those from vocab_size on are padding that is never read; targets_N [N]
    int64 in [0, vocab_size), or -100: such rows are never read.
    Cost: one read of the logits.
    Raises: ValueError naming the tensor that doesn't fit.
    """
    check_logits(logits_NVp, targets_N, first_column=first_column, vocab_size=vocab_size)
    if stats_N4 is not None:
        _check_contiguous("stats_N4", stats_N4, (len(targets_N), 4), logits_NVp.device)
        check_writable("stats_N4", stats_N4)
    return kernels_for(logits_NVp).row_stats(
        logits_NVp,
        targets_N.contiguous(),
        first_column=first_column,
        vocab_size=vocab_size,
        with_entropy=with_entropy,
        stats_N4=stats_N4,
    )


@torch.no_grad()
def combine(stats_RN4: Tensor, targets_N: Tensor, *, with_entropy: bool = True) -> Softmaxes:
    """Return each row's softmax from its states on all ranks, merged in their order.

    Every rank that gives the same states gets the same bits.
    Shapes: stats_RN4 [R, N, 4] fp32; targets_N [N] int64, >= 0 or -100 for ignored rows.
    Raises: ValueError naming the tensor that doesn't fit.
    """
    check_dense("stats_RN4", stats_RN4)
    if stats_RN4.dim() != 3 or stats_RN4.shape[0] < 1:
        raise ValueError(f"stats_RN4 must be [R, N, 4] with R >= 1, got {tuple(stats_RN4.shape)}")
    num_ranks, num_rows, _ = stats_RN4.shape
    _check_targets(targets_N, num_rows, stats_RN4.device)
    _check_contiguous("stats_RN4", stats_RN4, (num_ranks, num_rows, 4), targets_N.device)
    _check_values(targets_N, (targets_N != IGNORED_TARGET) & (targets_N < 0), "be >= 0")
    return kernels_for(stats_RN4).combine(
        stats_RN4, targets_N.contiguous(), with_entropy=with_entropy
    )


@torch.no_grad()
def row_grad_(
    logits_NVp: Tensor,
    targets_N: Tensor,
    *,
    maximum_N: Tensor,
    inverse_sum_N: Tensor,
    grad_N: Tensor,
    first_column: int,
    vocab_size: int,
) -> None:
    """Write grad * (one-hot of the target - softmax) over the logits, in their dtype.

    Shapes: logits_NVp and targets_N as for row_stats; the others [N] fp32: the softmaxes' maximum
    and inverse sum, and the gradient of the loss with respect to the target's log-prob, 0 for
    ignored rows. Padding columns and rows with a zero gradient become 0 without being read.
    Autograd sees that the logits were written, as by any operation in place.
    Cost: one read and one write of the logits.
    Raises: ValueError naming the tensor that doesn't fit.
    """
    check_logits(logits_NVp, targets_N, first_column=first_column, vocab_size=vocab_size)
    check_rows_apart(logits_NVp)
    check_writable("logits_NVp", logits_NVp)
    scales = {"maximum_N": maximum_N, "inverse_sum_N": inverse_sum_N, "grad_N": grad_N}
    for name, scale in scales.items():
        _check_contiguous(name, scale, (len(targets_N),), logits_NVp.device)
    kernels_for(logits_NVp).row_grad_(
        logits_NVp,
        targets_N.contiguous(),
        maximum_N=maximum_N,
        inverse_sum_N=inverse_sum_N,
        grad_N=grad_N,
        first_column=first_column,
        vocab_size=vocab_size,
    )


def check_logits(
    logits_NVp: Tensor, targets_N: Tensor, *, first_column: int, vocab_size: int
) -> None:
    """Return if the kernels can work on these. Raises: ValueError naming what doesn't fit."""
    check_dense("logits_NVp", logits_NVp)
    if logits_NVp.dim() != 2:
        raise ValueError(f"logits_NVp must be [N, Vp], got {tuple(logits_NVp.shape)}")
    if logits_NVp.dtype not in LOGIT_DTYPES:
        raise ValueError(f"logits_NVp must be fp32 or bf16, got {logits_NVp.dtype}")
    if logits_NVp.shape[1] > 1 and logits_NVp.stride(1) != 1:
        raise ValueError(
            f"logits_NVp must have stride 1 along the columns, got {logits_NVp.stride(1)}: "
            "call .contiguous() first"
        )
    check_integer("first_column", first_column, least=0)
    check_integer("vocab_size", vocab_size, least=1)
    check_targets(targets_N, logits_NVp.shape[0], logits_NVp.device, vocab_size=vocab_size)


def check_rows_apart(logits_NVp: Tensor) -> None:
    """Return if no two rows share memory, so that each can be written. Raises: ValueError."""
    if logits_NVp.shape[0] > 1 and logits_NVp.stride(0) < logits_NVp.shape[1]:
        raise ValueError(
            f"logits_NVp: rows of {logits_NVp.shape[1]} columns with stride "
            f"{logits_NVp.stride(0)} overlap and can't be written"
        )


def check_shards(num_columns: int, *, num_ranks: int, vocab_size: int) -> None:
    """Return if the ranks' columns are at least the vocabulary. Raises: ValueError otherwise."""
    if vocab_size > num_ranks * num_columns:
        raise ValueError(
            f"vocab_size must be 1 to {num_ranks * num_columns}, which is {num_columns} columns on "
            f"each of {num_ranks} ranks, got {vocab_size}"
        )


def check_targets(
    targets_N: Tensor, num_rows: int, device: torch.device, *, vocab_size: int
) -> None:
    """Return if there is a target for each row, each of the vocabulary or -100.

    Raises: ValueError otherwise.
    Cost: on a GPU one synchronisation.
    """
    _check_targets(targets_N, num_rows, device)
    is_bad_N = (targets_N != IGNORED_TARGET) & ((targets_N < 0) | (targets_N >= vocab_size))
    _check_values(targets_N, is_bad_N, f"lie in [0, {vocab_size})")


def _check_values(targets_N: Tensor, is_bad_N: Tensor, wanted: str) -> None:
    if bool(is_bad_N.any()):
        raise ValueError(
            f"targets_N must {wanted} or be {IGNORED_TARGET}, got {int(targets_N[is_bad_N][0])} in "
            f"row {int(is_bad_N.nonzero()[0])}"
        )


def _check_targets(targets_N: Tensor, num_rows: int, device: torch.device) -> None:
    check_dense("targets_N", targets_N)
    if targets_N.shape != (num_rows,) or targets_N.dtype != torch.int64:
        raise ValueError(
            f"targets_N must be [{num_rows}] int64, got {tuple(targets_N.shape)} {targets_N.dtype}"
        )
    if targets_N.device != device:
        raise ValueError(f"targets_N is on {targets_N.device}, expected {device}")
    if targets_N.is_meta:
        raise ValueError("targets_N is on meta, expected a device with memory")


def _check_contiguous(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    check_fp32(name, tensor, shape, device)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if shape[-1:] == (4,) and tensor.data_ptr() % 16:
        raise ValueError(f"{name} must start at a multiple of 16 bytes; a copy does")
