"""The kernels over rows of logits in plain torch: the reference, and what runs without a compiler.

Shapes: N rows, Vp columns of the vocabulary on this rank, R ranks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from poweropd_megatron.ops.backends import IGNORED_TARGET, Softmaxes
from poweropd_megatron.ops.compiled_rows import num_valid_columns

_LOWEST_EXPONENT = -150.0
"""Below it an exponential is zero in fp32; its factors are held to it, since 0 * -inf is NaN."""
_CHUNK_ELEMENTS = 1 << 22


def row_stats(
    logits_NVp: Tensor,
    targets_N: Tensor,
    *,
    first_column: int,
    vocab_size: int,
    with_entropy: bool = True,
    stats_N4: Tensor | None = None,
) -> Tensor:
    """Return the states of the rows; see ops.rows.row_stats."""
    columns = num_valid_columns(logits_NVp, first_column, vocab_size)
    new_N4 = torch.empty(len(targets_N), 4, device=logits_NVp.device)
    for rows in _row_chunks(logits_NVp):
        new_N4[rows] = _row_stats(
            logits_NVp[rows, :columns], targets_N[rows], first_column, with_entropy
        )
    if stats_N4 is None:
        return new_N4
    state, target_N = _merge(torch.stack([stats_N4, new_N4]))
    stats_N4.copy_(torch.stack([state[0], state[1], target_N, state[2]], dim=1))
    return stats_N4


def combine(stats_RN4: Tensor, targets_N: Tensor, *, with_entropy: bool = True) -> Softmaxes:
    """Return the rows' softmaxes; see ops.rows.combine."""
    (maximum_N, sum_N, weighted_N), target_N = _merge(stats_RN4)
    live_N = targets_N != IGNORED_TARGET
    logp_N = (target_N - maximum_N) - sum_N.log()
    entropy_N = sum_N.log() - weighted_N / sum_N
    return Softmaxes(
        logp_N=torch.where(live_N, logp_N, 0.0),
        entropy_N=torch.where(live_N, entropy_N, 0.0) if with_entropy else None,
        maximum_N=torch.where(live_N, maximum_N, 0.0),
        inverse_sum_N=torch.where(live_N, 1 / sum_N, 0.0),
    )


def token_reward(
    kind: str, teacher_logp_N: Tensor, student_logp_N: Tensor, *, a: float = 0.0, b: float = 0.0
) -> Tensor:
    """Return the rewards; see ops.rewards.token_reward."""
    difference_N = teacher_logp_N - student_logp_N
    if kind == "log_ratio":
        reward_N = difference_N
    elif kind == "clip":
        reward_N = difference_N.clamp(a, b)
    elif kind == "tanh":
        reward_N = torch.tanh(difference_N / a)
    else:
        larger_N = torch.where(difference_N > 0, teacher_logp_N, student_logp_N)
        size_N = torch.exp(a * larger_N) * -torch.expm1(-a * difference_N.abs())
        reward_N = torch.where(difference_N > 0, size_N, -size_N)
        if kind == "box_cox":
            reward_N = reward_N / a
    return torch.where(teacher_logp_N == student_logp_N, 0.0, reward_N)


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
    """Write the gradient over the logits; see ops.rows.row_grad_."""
    columns = num_valid_columns(logits_NVp, first_column, vocab_size)
    logits_NVp[:, columns:] = 0
    for rows in _row_chunks(logits_NVp):
        grad_n = grad_N[rows, None]
        part = logits_NVp[rows, :columns]
        local_n, is_here_n = _local_targets(targets_N[rows], first_column, columns)
        result = (part.float() - maximum_N[rows, None]).exp_()
        result *= -grad_n * inverse_sum_N[rows, None]
        if columns:
            result.scatter_add_(1, local_n[:, None], torch.where(is_here_n[:, None], grad_n, 0.0))
        part.copy_(torch.where(grad_n == 0, 0.0, result))


def _row_stats(logits: Tensor, targets_N: Tensor, first_column: int, with_entropy: bool) -> Tensor:
    scores = logits.float()
    blank_N = scores.new_full((len(scores),), -torch.inf)
    maximum_N = (
        scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1) if scores.shape[1] else blank_N
    )
    exponents = scores - maximum_N[:, None]
    # A row of -inf alone has the state of no columns; a NaN anywhere stays.
    empty_N = maximum_N == -torch.inf
    exponents = torch.where(empty_N[:, None], scores, exponents)
    weights = exponents.exp()
    weighted_N = torch.zeros_like(maximum_N)
    if with_entropy:
        weighted_N = (weights * exponents.clamp(min=_LOWEST_EXPONENT)).sum(1)
        weighted_N = torch.where(empty_N, 0.0, weighted_N)
    local_N, is_here_N = _local_targets(targets_N, first_column, logits.shape[1])
    target_N = blank_N
    if logits.shape[1]:
        target_N = torch.where(is_here_N, scores.gather(1, local_N[:, None])[:, 0], blank_N)
    stats_N4 = torch.stack([maximum_N, weights.sum(1), target_N, weighted_N], dim=1)
    ignored_4 = scores.new_tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    return torch.where((targets_N == IGNORED_TARGET)[:, None], ignored_4, stats_N4)


def _merge(stats_RN4: Tensor) -> tuple[Tensor, Tensor]:
    """Return (maximum, sum, weighted sum) [3, N] over the ranks, and the target's logit [N]."""
    maximum_RN, sum_RN, target_RN, weighted_RN = stats_RN4.unbind(-1)
    maximum_N = maximum_RN.amax(0)
    shift_RN = torch.where(maximum_RN == -torch.inf, -torch.inf, maximum_RN - maximum_N)
    scale_RN = shift_RN.exp()
    # The empty states' sum is 0, or NaN, which has to stay.
    sums_RN = torch.where(maximum_RN == -torch.inf, sum_RN, sum_RN * scale_RN)
    moved_RN = scale_RN * (weighted_RN + sum_RN * shift_RN.clamp(min=_LOWEST_EXPONENT))
    weights_RN = torch.where(maximum_RN == -torch.inf, 0.0, moved_RN)
    missing_RN = target_RN == -torch.inf
    target_N = torch.where(missing_RN, 0.0, target_RN).sum(0)
    target_N = torch.where(missing_RN.all(0), -torch.inf, target_N)
    return torch.stack([maximum_N, sums_RN.sum(0), weights_RN.sum(0)]), target_N


def _local_targets(targets_N: Tensor, first_column: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return each target's column on this rank (0 where it is elsewhere) and whether it is here."""
    local_N = targets_N - first_column
    is_here_N = (local_N >= 0) & (local_N < columns)
    return torch.where(is_here_N, local_N, 0), is_here_N


def _row_chunks(logits_NVp: Tensor) -> Iterator[slice]:
    """Yield slices of rows that keep temporary tensors small."""
    size = max(1, _CHUNK_ELEMENTS // max(1, logits_NVp.shape[1]))
    for begin in range(0, len(logits_NVp), size):
        yield slice(begin, begin + size)
