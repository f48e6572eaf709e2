"""The row operations of the CPU, compiled for each instruction set and in plain torch."""

import shutil
from collections.abc import Iterator

import pytest
from support.reward_checks import check_rewards
from support.row_cases import CASES
from support.row_checks import RowBackend, check_stats_and_gradient

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


def test_rewards_are_those_of_fp64(backend: RowBackend) -> None:
    check_rewards(backend)
