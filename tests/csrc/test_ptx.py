"""The CUDA kernels as nvcc compiles them, interpreted instruction by instruction."""

from collections.abc import Callable

import pytest
import torch
from support import ptx_backend
from support.ptx.arithmetic import EX2_ERROR
from support.ptx.program import Kernel
from support.ptx_backend import coverage, ptx_rows
from support.reward_checks import check_rewards
from support.row_cases import CASES
from support.row_checks import check_order_of_ranks, check_stats_and_gradient
from support.simt_checks import bits, suits

REASON = ptx_backend.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
COVERING = ("V9", "V1003", "V18992", "tiles", "wide")
"""Rows with and without whole rounds of loads, at any number of threads."""
NOISY = ("V257", "V4099", "TP8", "odd-stride", "padded-TP4")


def names_of(*kinds: str) -> list[str]:
    return [f"{kind}-{dtype}" for kind in kinds for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    """Return the kernels by their names."""
    return ptx_backend.compile_kernels(tmp_path_factory.mktemp("ptx") / "launch.ptx")


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for block in (32, 256) for name in CASES if suits(CASES[name], block)],
)
def test_results_are_those_of_fp64(name: str, block: int, kernels: dict[str, Kernel]) -> None:
    check_stats_and_gradient(ptx_rows(kernels, block=block), CASES[name])


def test_ranks_are_merged_in_their_order(kernels: dict[str, Kernel]) -> None:
    check_order_of_ranks(ptx_rows(kernels, block=32))


@pytest.mark.parametrize("noise", [None, 0, 1])
def test_rewards_are_those_of_fp64(noise: int | None, kernels: dict[str, Kernel]) -> None:
    check_rewards(ptx_rows(kernels, block=32, noise=noise))


@pytest.mark.parametrize("name", names_of(*NOISY))
def test_results_are_the_same_bits_in_any_order_of_threads(
    name: str, kernels: dict[str, Kernel]
) -> None:
    behind_first, ahead_first = (
        bits(check_stats_and_gradient(ptx_rows(kernels, block=256, order=order), CASES[name]))
        for order in ("min", "max")
    )
    assert torch.equal(behind_first, ahead_first)


@pytest.mark.parametrize("name", names_of(*NOISY))
@pytest.mark.parametrize("noise", [0, 1])
def test_results_bear_the_error_of_the_hardware_s_exponential(
    name: str, noise: int, kernels: dict[str, Kernel]
) -> None:
    rows = ptx_rows(kernels, block=256, noise=noise)
    check_stats_and_gradient(rows, CASES[name], exp_error=EX2_ERROR)


def test_few_cases_execute_what_was_compiled(
    kernels: dict[str, Kernel], record_testsuite_property: Callable[[str, object], None]
) -> None:
    check_rewards(ptx_rows(kernels, block=32))
    for block in (32, 256, 512, 1024):
        for name in names_of(*COVERING):
            if suits(CASES[name], block):
                check_stats_and_gradient(ptx_rows(kernels, block=block), CASES[name])
    assert all(kernel.executed for kernel in kernels.values())
    executed = coverage(kernels)
    record_testsuite_property("executed share of the PTX", executed)
    assert executed > 0.95
