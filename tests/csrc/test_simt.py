"""The CUDA kernels, compiled by g++ and run on the SIMT emulator."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import simt_backend
from support.reward_checks import check_rewards
from support.row_cases import CASES
from support.row_checks import check_order_of_ranks, check_stats_and_gradient
from support.simt_backend import EmulationError, simt_rows
from support.simt_checks import bits, check_case, suits

REASON = simt_backend.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BLOCKS = (32, 256, 512, 1024)
LARGE = [name for name, case in CASES.items() if case.large]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the kernels over the emulator."""
    return simt_backend.build(tmp_path_factory.mktemp("simt") / "plain.so")


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for block in BLOCKS for name in CASES if suits(CASES[name], block)],
)
def test_results_are_those_of_fp64_and_the_same_bits_in_any_order_of_threads(
    name: str, block: int, library: Path
) -> None:
    check_case(library, name, block)


@pytest.mark.parametrize("name", LARGE)
def test_vocabularies_of_models_are_exact(name: str, library: Path) -> None:
    check_stats_and_gradient(simt_rows(library), CASES[name])


def test_ranks_are_merged_in_their_order(library: Path) -> None:
    check_order_of_ranks(simt_rows(library))


def test_rewards_are_those_of_fp64(library: Path) -> None:
    check_rewards(simt_rows(library))


@pytest.mark.parametrize(
    ("name", "block"), [("V4099-fp32", 256), ("V18992-bf16", 512), ("wide-fp32", 1024)]
)
def test_wide_rows_get_more_threads(name: str, block: int, library: Path) -> None:
    """The sums of the softmax tell how many threads there were."""
    chosen, expected, *others = (
        bits(check_stats_and_gradient(simt_rows(library, block=size), CASES[name]))
        for size in (0, block, *{256, 512, 1024} - {block})
    )
    assert torch.equal(chosen, expected)
    assert not any(torch.equal(chosen, other) for other in others)


def test_a_block_that_was_not_compiled_is_refused(library: Path) -> None:
    with pytest.raises(EmulationError, match="refused"):
        check_stats_and_gradient(simt_rows(library, block=64), CASES["V7-fp32"])


def test_no_undefined_behaviour_in_any_case(tmp_path: Path) -> None:
    library = simt_backend.build(tmp_path / "sanitized.so", flags=simt_backend.SANITIZED)
    result = subprocess.run(
        [sys.executable, "-m", "support.simt_checks", str(library), "32", "256"],
        env=simt_backend.sanitizer_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
