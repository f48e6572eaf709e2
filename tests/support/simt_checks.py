"""The rows' cases on the SIMT emulator: python -m support.simt_checks LIBRARY BLOCK...

It is a program, too, since a sanitizer that finds something ends the process.
"""

import sys
from pathlib import Path

import torch
from support.reward_checks import check_rewards
from support.row_cases import CASES, Case
from support.row_checks import check_stats_and_gradient
from support.simt_backend import simt_rows
from torch import Tensor

SEEDS = (0, 1, 2)
"""Ascending, descending and random order of the threads."""


def suits(case: Case, block: int) -> bool:
    """Return whether a case is worth its time, and small enough to add up with few threads."""
    if (block == 1024 and case.tp_size > 1) or (block != 32 and len(case.kinds) > 100):
        return False
    return not case.large and case.vocab_size <= 1024 * block


def bits(results: Tensor) -> Tensor:
    """Return what two equal results have in common: NaN has many representations."""
    return torch.where(results.isnan(), torch.nan, results).view(torch.int32)


def check_case(library: Path, name: str, block: int) -> None:
    """Check a case, and that its results don't depend on the order of the threads."""
    first, *others = (
        bits(check_stats_and_gradient(simt_rows(library, block=block, seed=seed), CASES[name]))
        for seed in SEEDS
    )
    for seed, other in zip(SEEDS[1:], others, strict=True):
        assert torch.equal(first, other), f"other results in the order of seed {seed}"


def main() -> None:
    torch.set_num_threads(1)
    library = Path(sys.argv[1])
    check_rewards(simt_rows(library))
    for block in map(int, sys.argv[2:]):
        for name, case in CASES.items():
            if suits(case, block):
                print(f"{name}, {block} threads", flush=True)
                check_stats_and_gradient(simt_rows(library, block=block, seed=SEEDS[-1]), case)


if __name__ == "__main__":
    main()
