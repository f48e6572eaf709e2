"""The row operations of the CPU, compiled for each instruction set and in plain torch."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from support.reward_checks import check_rewards
from support.row_cases import CASES
from support.row_checks import RowBackend, check_order_of_ranks, check_stats_and_gradient

from poweropd_megatron.ops import torch_rows
from poweropd_megatron.ops.backends import compiled

CAPABILITIES = ("avx512", "avx2", "portable")


@pytest.fixture(params=["torch", *CAPABILITIES])
def backend(request: pytest.FixtureRequest) -> Iterator[RowBackend]:
    """Yield each implementation that this processor can run."""
    if request.param == "torch":
        yield torch_rows
        return
    kernels = compiled("cpu")
    if isinstance(kernels, str):
        if shutil.which("c++"):
            pytest.fail(f"there is a compiler, but no compiled module: {kernels}")
        pytest.skip("no C++ compiler, so no compiled module")
    first, *_ = available = kernels.module.capabilities()
    if request.param not in available:
        pytest.skip(f"this processor has no {request.param}")
    kernels.module.set_capability(request.param)
    yield kernels
    kernels.module.set_capability(first)


@pytest.mark.parametrize("name", CASES)
def test_stats_log_probs_and_gradients_are_those_of_fp64(name: str, backend: RowBackend) -> None:
    check_stats_and_gradient(backend, CASES[name])


def test_ranks_are_merged_in_their_order(backend: RowBackend) -> None:
    check_order_of_ranks(backend)


def test_rewards_are_those_of_fp64(backend: RowBackend) -> None:
    check_rewards(backend)


def test_gradients_in_bf16_are_rounded_to_the_nearest_and_ties_to_even(backend: RowBackend) -> None:
    """Logits of 0 and a scale of -1 leave each row's upstream gradient, of every rounding."""
    generator = torch.Generator().manual_seed(0)
    bits_N = torch.randint(-(2**31), 2**31, (3000,), generator=generator).to(torch.int32)
    bits_N[:1000] = (bits_N[:1000] & -65536) | 0x8000
    grad_N = bits_N.view(torch.float32)
    grad_N = grad_N[grad_N.isfinite() & (grad_N.abs() > 1e-30)]
    for width in (3, 16, 40):
        logits = torch.zeros(len(grad_N), width, dtype=torch.bfloat16)
        backend.row_grad_(
            logits,
            torch.zeros(len(grad_N), dtype=torch.int64),
            maximum_N=torch.zeros(len(grad_N)),
            inverse_sum_N=torch.ones(len(grad_N)),
            grad_N=-grad_N,
            first_column=5,
            vocab_size=1000,
        )
        assert torch.equal(logits, grad_N.to(torch.bfloat16)[:, None].expand(-1, width))


def test_long_rows_add_up_without_the_rounding_of_one_fp32_sum(backend: RowBackend) -> None:
    logits = torch.randn(48, 151936, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(48, dtype=torch.int64)
    stats = backend.row_stats(logits, targets, first_column=0, vocab_size=151936)
    exact = (logits.double() - logits.amax(1).double()[:, None]).exp().sum(1)
    error = ((stats[:, 1].double() - exact) / exact).square().mean().sqrt()
    assert error < 1e-7, f"{error:.1e}"
