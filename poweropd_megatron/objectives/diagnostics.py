"""What a batch of rewards looks like, for the metrics and the report: pure functions, no gradients.

Shapes: B sequences, T tokens of the longest sequence, N unmasked response tokens, K bins. Tensors
are fp32 on the CPU; log-probs are natural.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

DEAD_REWARD = 1e-6
"""A reward below this moves nothing."""
DEAD_LOG_RATIO = 0.1
"""Models whose log-probs differ by more than this disagree about the token."""


def reward_metrics(
    reward_N: Tensor, teacher_logp_N: Tensor, student_logp_N: Tensor
) -> dict[str, float]:
    """Return reward/{mean,std,rms,min,max,p05,p95,dead_fraction} and kl/student_teacher of a batch.

    std is the population's; rms is the root mean square, by which grad_norm_per_reward divides.
    p05 and p95 interpolate linearly, as numpy does. The dead fraction counts tokens without a
    reward although the models disagree: it tells when alpha is too large. kl/student_teacher is the
    mean of log p_S - log p_T, the k1 estimate, in nats a token.

    Shapes: all [N]. With N = 0 every value is 0.0.
    Cost: linear in N.
    """
    if reward_N.numel() == 0:
        names = ("mean", "std", "rms", "min", "max", "p05", "p95", "dead_fraction")
        return {f"reward/{name}": 0.0 for name in names} | {"kl/student_teacher": 0.0}
    std, mean = torch.std_mean(reward_N, correction=0)
    smallest, p05, p95, largest = quantiles(reward_N, (0.0, 0.05, 0.95, 1.0))
    log_ratio_N = teacher_logp_N - student_logp_N
    dead_N = (reward_N.abs() < DEAD_REWARD) & (log_ratio_N.abs() > DEAD_LOG_RATIO)
    return {
        "reward/mean": mean.item(),
        "reward/std": std.item(),
        "reward/rms": reward_N.double().square().mean().sqrt().item(),
        "reward/min": smallest,
        "reward/max": largest,
        "reward/p05": p05,
        "reward/p95": p95,
        "reward/dead_fraction": dead_N.sum().item() / dead_N.numel(),
        "kl/student_teacher": -log_ratio_N.mean(dtype=torch.float64).item(),
    }


def quantiles(value_N: Tensor, fractions: Sequence[float]) -> list[float]:
    """Return the linearly interpolated quantiles of N >= 1 values, for any N.

    Source: numpy.quantile's default method, over one partial sort (torch.quantile refuses
    N > 2**24).
    """
    ranks = [fraction * (value_N.numel() - 1) for fraction in fractions]
    needed = sorted({bound for rank in ranks for bound in (math.floor(rank), math.ceil(rank))})
    ordered_N = np.partition(value_N.numpy(), needed)
    below = [float(ordered_N[math.floor(rank)]) for rank in ranks]
    above = [float(ordered_N[math.ceil(rank)]) for rank in ranks]
    return [
        low + (high - low) * (rank % 1.0)
        for low, high, rank in zip(below, above, ranks, strict=True)
    ]


def reward_by_position(
    reward_BT: Tensor, mask_BT: Tensor, prompt_lengths_B: Tensor, *, num_bins: int = 32
) -> dict[str, list[int] | list[float | None]]:
    """Return mean, min, max and count of the reward over bins of the position in the response.

    Position 0 is the first response token. Bin k holds edges[k] <= position < edges[k + 1]; edges
    are whole numbers from 0 to the last unmasked position + 1, and there are fewer than num_bins
    when the responses are shorter than that. Bins whose every token is masked hold None.

    Shapes: reward_BT and mask_BT [B, T], where column t is token t of prompt and response (as in
    Trajectories); prompt_lengths_B [B]. Lists: edges [K + 1], the others [K]; K = 0 where nothing
    is unmasked.
    """
    row_N, column_N = mask_BT.nonzero(as_tuple=True)
    if row_N.numel() == 0:
        return {"edges": [0], "mean": [], "min": [], "max": [], "count": []}
    reward_N = reward_BT[row_N, column_N]
    position_N = column_N - prompt_lengths_B[row_N]
    length = int(position_N.max()) + 1
    num_bins = min(num_bins, length)
    edges = [k * length // num_bins for k in range(num_bins + 1)]
    bin_N = torch.bucketize(position_N, torch.tensor(edges), right=True) - 1
    count_K = torch.bincount(bin_N, minlength=num_bins)
    return {
        "edges": edges,
        "mean": _means(reward_N, bin_N, count_K),
        "min": _extremes(reward_N, bin_N, count_K, "amin"),
        "max": _extremes(reward_N, bin_N, count_K, "amax"),
        "count": count_K.tolist(),
    }


def reward_map(
    reward_N: Tensor, teacher_logp_N: Tensor, student_logp_N: Tensor, *, num_bins: int = 20
) -> dict[str, list[float] | list[list[int]] | list[list[float | None]]]:
    """Return the count and the mean reward of the pairs (p_T, p_S) on a grid over [0, 1]^2.

    Cell [i][j] holds edges[i] <= p_T < edges[i + 1] and edges[j] <= p_S < edges[j + 1] (the last
    bin includes 1); the mean reward of an empty cell is None.

    Shapes: all [N]. Lists: edges [K + 1], count and mean [K][K], K = num_bins.
    """
    cell_N = _probability_bin(teacher_logp_N, num_bins) * num_bins
    cell_N += _probability_bin(student_logp_N, num_bins)
    count_KK = torch.bincount(cell_N, minlength=num_bins * num_bins)
    mean = _means(reward_N, cell_N, count_KK)
    return {
        "edges": [k / num_bins for k in range(num_bins + 1)],
        "count": count_KK.view(num_bins, num_bins).tolist(),
        "mean": [mean[k : k + num_bins] for k in range(0, len(mean), num_bins)],
    }


def reward_surface(
    reward: Callable[[Tensor, Tensor], Tensor], *, num_bins: int = 20
) -> list[list[float]]:
    """Return the reward in the middle of each cell of reward_map's grid, [K][K].

    Of the function that the run rewards with, from (teacher_logp, student_logp) of each token.
    """
    logp_K = torch.tensor([(k + 0.5) / num_bins for k in range(num_bins)]).log()
    teacher_logp_KK, student_logp_KK = torch.meshgrid(logp_K, logp_K, indexing="ij")
    flat = reward(teacher_logp_KK.flatten(), student_logp_KK.flatten())
    surface: list[list[float]] = flat.view(num_bins, num_bins).tolist()
    return surface


def reward_histogram(reward_N: Tensor) -> dict[str, list[float] | list[int] | int]:
    """Return how many rewards have which sign and magnitude, in bins of a quarter of a decade.

    Bin k of negative and of positive holds edges[k] <= |reward| < edges[k + 1]; the last one has
    all that are larger, too, and zero those that are smaller than the first, DEAD_REWARD.

    Shapes: [N]. Lists: edges [K + 1], the others [K].
    """
    edges = [10.0 ** (power / 4) for power in range(-24, 9)]
    magnitude_N = reward_N.double().abs()
    bin_N = torch.bucketize(magnitude_N, torch.tensor(edges, dtype=torch.float64), right=True)
    bin_N = bin_N.clamp(max=len(edges) - 1)

    def count(sign_N: Tensor) -> list[int]:
        count_K: list[int] = torch.bincount(bin_N[sign_N], minlength=len(edges))[1:].tolist()
        return count_K

    return {
        "edges": edges,
        "negative": count(reward_N < 0),
        "zero": int((bin_N == 0).sum()),
        "positive": count(reward_N > 0),
    }


def _probability_bin(logp_N: Tensor, num_bins: int) -> Tensor:
    """Return the bin of each probability; a NaN falls into bin 0, where its NaN mean shows it."""
    return (logp_N.exp() * num_bins).long().clamp_(0, num_bins - 1)


def _means(value_N: Tensor, bin_N: Tensor, count_K: Tensor) -> list[float | None]:
    total_K = torch.bincount(bin_N, weights=value_N.double(), minlength=count_K.numel())
    return _with_gaps(total_K / count_K, count_K)


def _extremes(value_N: Tensor, bin_N: Tensor, count_K: Tensor, reduce: str) -> list[float | None]:
    extreme_K = value_N.new_zeros(count_K.numel())
    extreme_K.scatter_reduce_(0, bin_N, value_N, reduce, include_self=False)
    return _with_gaps(extreme_K, count_K)


def _with_gaps(value_K: Tensor, count_K: Tensor) -> list[float | None]:
    pairs = zip(value_K.tolist(), count_K.tolist(), strict=True)
    return [value if count else None for value, count in pairs]
