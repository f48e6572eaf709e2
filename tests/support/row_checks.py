"""What holds of every back-end of the row operations, against fp64 arithmetic.

Shapes: N tokens (rows), V vocabulary, Vp columns of a shard, R shards, 4 a shard's softmax state.
"""

import math

import torch
from support.row_cases import IGNORED, Case, Rows, Shard, cut, make_rows
from torch import Tensor

from poweropd_megatron.ops.backends import RowKernels as RowBackend
from poweropd_megatron.ops.backends import Softmaxes


def assert_within(actual: Tensor, expected: Tensor, allowed: Tensor | float, what: str) -> None:
    """Assert |actual - expected| <= allowed, and infinities and NaN in the same places."""
    actual, expected = actual.double().cpu(), expected.double()
    allowed = torch.as_tensor(allowed, dtype=torch.float64).broadcast_to(expected.shape)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    wrong = ~(same | ((actual - expected).abs() <= allowed))
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} wrong, first at {where}: {actual[where].item()!r}, "
            f"expected {expected[where].item()!r} within {allowed[where].item():.1e}"
        )


def check_stats_and_gradient(
    backend: RowBackend, case: Case, device: str = "cpu", *, exp_error: float = 0.0
) -> Tensor:
    """Check a case's states, log-probs, entropies and gradients; return all of them in a row.

    exp_error: relative error of the exponentials beyond fp32's rounding, as of CUDA's ex2.approx.
    """
    rows = make_rows(case)
    shards = cut(case, rows.logits_NV, device)
    targets_N = rows.targets_N.to(device)
    kept = [_bits(shard.logits_NVp).clone() for shard in shards]
    stats_RN4 = _visit(backend, case, shards, targets_N, with_entropy=True)
    plain_RN4 = _visit(backend, case, shards, targets_N, with_entropy=False)
    for shard, stats_N4, bits in zip(shards, stats_RN4, kept, strict=True):
        assert torch.equal(_bits(shard.logits_NVp), bits), "row_stats changed the logits"
        _check_stats(stats_N4.cpu(), shard, rows.targets_N)
    combined = backend.combine(stats_RN4, targets_N)
    _check_log_probs(combined, rows, entropies=True)
    plain = backend.combine(plain_RN4, targets_N, with_entropy=False)
    _check_log_probs(plain, rows, entropies=False)
    for with_entropy in (True, False) if case.tiles > 1 else ():
        tiled_RN4 = _visit_tiles(backend, case, shards, targets_N, with_entropy=with_entropy)
        tiled = backend.combine(tiled_RN4, targets_N, with_entropy=with_entropy)
        _check_log_probs(tiled, rows, entropies=with_entropy)
    _run_row_grad(backend, case, shards, rows, combined)
    gradient_NV = torch.cat([shard.logits_NVp[:, : shard.columns] for shard in shards], 1).cpu()
    _check_gradient(gradient_NV, rows, exp_error)
    assert combined.entropy_N is not None
    per_row = (combined.logp_N, combined.entropy_N, combined.maximum_N, combined.inverse_sum_N)
    results = [stats_RN4.flatten(), *per_row, gradient_NV.float().flatten()]
    return torch.cat([result.cpu() for result in results])


def check_order_of_ranks(backend: RowBackend, device: str = "cpu") -> None:
    """Check that ranks are merged from the first on: 1 swallows 2^-24 twice, but not 2^-23."""
    sums_R = torch.tensor([1.0, 2.0**-24, 2.0**-24], device=device)
    stats_RN4 = torch.zeros(3, 1, 4, device=device)
    stats_RN4[:, 0, 1] = sums_R
    combined = backend.combine(stats_RN4, torch.zeros(1, dtype=torch.int64, device=device))
    assert combined.inverse_sum_N.item() == 1.0, "the ranks are merged in another order"


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)


def _visit(
    backend: RowBackend, case: Case, shards: list[Shard], targets_N: Tensor, *, with_entropy: bool
) -> Tensor:
    return torch.stack(
        [
            backend.row_stats(
                shard.logits_NVp,
                targets_N,
                first_column=shard.first_column,
                vocab_size=case.vocab_size,
                with_entropy=with_entropy,
            )
            for shard in shards
        ]
    )


def _visit_tiles(
    backend: RowBackend, case: Case, shards: list[Shard], targets_N: Tensor, *, with_entropy: bool
) -> Tensor:
    tile = -(-case.shard_width // case.tiles)
    nothing_4 = torch.tensor([-math.inf, 0, -math.inf, 0], device=targets_N.device)
    stats_RN4 = nothing_4.repeat(len(shards), len(targets_N), 1)
    for shard, stats_N4 in zip(shards, stats_RN4, strict=True):
        for first in range(0, case.shard_width, tile):
            returned_N4 = backend.row_stats(
                shard.logits_NVp[:, first : first + tile],
                targets_N,
                first_column=shard.first_column + first,
                vocab_size=case.vocab_size,
                with_entropy=with_entropy,
                stats_N4=stats_N4,
            )
            assert returned_N4.data_ptr() == stats_N4.data_ptr(), "stats were not added in place"
    return stats_RN4


def _check_stats(stats_N4: Tensor, shard: Shard, targets_N: Tensor) -> None:
    assert stats_N4.dtype == torch.float32
    logits_NV = shard.logits_NVp[:, : shard.columns].cpu().double()
    ignored_N = targets_N == IGNORED
    logits_NV[ignored_N] = -math.inf
    maximum_N, sum_N, target_N, weighted_N = stats_N4.double().unbind(1)

    column_N = targets_N - shard.first_column
    here_N = (column_N >= 0) & (column_N < shard.columns)
    expected_N = torch.full_like(target_N, -math.inf)
    expected_N[here_N] = logits_NV[here_N, column_N[here_N]]
    assert_within(target_N, expected_N, 0, "target's logit")

    if shard.columns == 0:
        logits_NV = logits_NV.new_full((len(logits_NV), 1), -math.inf)
    finite_N = ~(logits_NV.isnan() | (logits_NV == math.inf)).any(1)
    assert sum_N[~finite_N].isnan().all(), "a NaN or an infinity is lost"
    logits_NV, maximum_N = logits_NV[finite_N], maximum_N[finite_N]
    assert_within(maximum_N, logits_NV.amax(1), 0, "maximum")
    exponents_NV = logits_NV - maximum_N[:, None].nan_to_num(neginf=0)
    weights_NV = exponents_NV.exp()
    assert_within(sum_N[finite_N], weights_NV.sum(1), 5e-6 * weights_NV.sum(1), "sum")
    products_NV = torch.where(weights_NV > 0, weights_NV * exponents_NV, 0)
    allowed_N = 1e-5 * (1 - products_NV.sum(1))
    assert_within(weighted_N[finite_N], products_NV.sum(1), allowed_N, "weighted sum")


def _check_log_probs(combined: Softmaxes, rows: Rows, *, entropies: bool) -> None:
    logp_NV = torch.log_softmax(rows.logits_NV.double(), 1)
    ignored_N = rows.targets_N == IGNORED
    logp_N = logp_NV.gather(1, rows.targets_N.clamp(min=0)[:, None])[:, 0]
    logp_N[ignored_N] = 0
    allowed_N = 2e-6 * logp_N.abs().clamp(min=1)
    assert_within(combined.logp_N, logp_N, allowed_N, "log-prob")
    if entropies:
        assert combined.entropy_N is not None
        entropy_N = torch.special.entr(logp_NV.exp()).sum(1)
        entropy_N[ignored_N] = 0
        assert_within(combined.entropy_N, entropy_N, 1e-5, "entropy")
    else:
        assert combined.entropy_N is None
    for scale_N in (combined.maximum_N, combined.inverse_sum_N):
        assert scale_N.dtype == torch.float32
        assert (scale_N.cpu()[ignored_N] == 0).all(), "an ignored row has a scale"


def _run_row_grad(
    backend: RowBackend, case: Case, shards: list[Shard], rows: Rows, combined: Softmaxes
) -> None:
    """Rows without a gradient are made NaN before, since they must not be read."""
    for shard in shards:
        kept = [_bits(guard).clone() for guard in shard.guards]
        shard.logits_NVp[rows.grad_N.to(shard.logits_NVp.device) == 0] = math.nan
        backend.row_grad_(
            shard.logits_NVp,
            rows.targets_N.to(shard.logits_NVp.device),
            maximum_N=combined.maximum_N,
            inverse_sum_N=combined.inverse_sum_N,
            grad_N=rows.grad_N.to(shard.logits_NVp.device),
            first_column=shard.first_column,
            vocab_size=case.vocab_size,
        )
        for guard, bits in zip(shard.guards, kept, strict=True):
            assert torch.equal(_bits(guard), bits), "row_grad_ wrote outside of the rows"
        assert (shard.logits_NVp[:, shard.columns :] == 0).all(), "padding has a gradient"


def _check_gradient(gradient_NV: Tensor, rows: Rows, exp_error: float) -> None:
    """Each element within a rounding of the dtype, and rows within twice the error of torch."""
    expected_NV = _torch_gradient(rows, torch.float64)
    size_N1 = rows.grad_N.double().abs()[:, None]
    rounding = torch.finfo(gradient_NV.dtype).eps / 2
    allowed_NV = (rounding + 1e-5) * expected_NV.abs() + 1e-37 * size_N1
    targets_N1 = rows.targets_N.clamp(min=0)[:, None]
    allowed_NV.scatter_add_(1, targets_N1, (4e-7 + 4 * exp_error) * size_N1)
    assert_within(gradient_NV, expected_NV, allowed_NV, "gradient")

    usable_N = (size_N1[:, 0] > 0) & expected_NV.isfinite().all(1)
    if usable_N.any():
        plain_NV = _torch_gradient(rows, gradient_NV.dtype)
        scaled_NV = (expected_NV / size_N1)[usable_N]
        error = ((gradient_NV.double() / size_N1)[usable_N] - scaled_NV).abs().max()
        plain_error = ((plain_NV.double() / size_N1)[usable_N] - scaled_NV).abs().max()
        few_roundings = 2 * torch.finfo(torch.float32).eps + 4 * exp_error
        allowed = max(2 * plain_error, rounding * scaled_NV.abs().max(), few_roundings)
        assert error <= allowed, f"gradient: error {error:.1e}, torch's is {plain_error:.1e}"


def _torch_gradient(rows: Rows, dtype: torch.dtype) -> Tensor:
    """Return what autograd makes of log_softmax in a dtype, zero where the upstream one is."""
    logits_NV = rows.logits_NV.to(dtype).requires_grad_()
    logp_NV = torch.log_softmax(logits_NV, 1)
    logp_N = logp_NV.gather(1, rows.targets_N.clamp(min=0)[:, None])[:, 0]
    (gradient_NV,) = torch.autograd.grad(logp_N, logits_NV, rows.grad_N.to(dtype))
    return torch.where(rows.grad_N[:, None] == 0, 0, gradient_NV)
