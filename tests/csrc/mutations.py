"""Seeds bugs into the CUDA kernels and sees that each is noticed: python tests/csrc/mutations.py

The first build of all is of the kernels as they are, in which nothing may be noticed.
"""

import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutants import MUTANTS, Catcher, Mutant
from support import ptx_backend, simt_backend
from support.ptx_backend import ptx_rows
from support.reward_checks import check_rewards
from support.row_cases import CASES
from support.row_checks import check_order_of_ranks, check_stats_and_gradient
from support.simt_backend import simt_rows
from support.simt_checks import check_case

BLOCK = 256
NAMES = (
    "V7-fp32",
    "V257-bf16",
    "V4099-fp32",
    "TP4-bf16",
    "odd-stride-bf16",
    "tiles-bf16",
    "padded-TP4-fp32",
    "nan-in-each-column-fp32",
    "far-rows-bf16",
)
"""Enough to notice each of the bugs."""
AS_IS = Mutant(
    name="the kernels as they are",
    file="numerics.h",
    text="#pragma once",
    replacement="#pragma once",
    caught_by=("simt", "ptx"),
)
FORK = multiprocessing.get_context("fork")
TIMEOUT_SECONDS = 60


def in_child(check: Callable[[], None]) -> str | None:
    """Return what was wrong in a process of its own: the error, a signal, or no end."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_report, args=(check, sender))
    child.start()
    child.join(TIMEOUT_SECONDS)
    if child.is_alive():
        child.kill()
        return "does not end"
    return receiver.recv() if receiver.poll() else f"signal {-(child.exitcode or 0)}"


def _report(check: Callable[[], None], sender: Connection) -> None:
    try:
        check()
    except Exception as error:
        sender.send(str(error))
    else:
        sender.send(None)


def noticed_by_simt(csrc: Path) -> str | None:
    """Return what the emulator's cases find wrong."""
    library = simt_backend.build(csrc / "simt.so", csrc=csrc, flags=("-O1",))

    def check() -> None:
        for name in NAMES:
            check_case(library, name, BLOCK)
        rows = simt_rows(library, block=BLOCK)
        check_stats_and_gradient(rows, CASES["many-rows"])
        check_order_of_ranks(rows)
        check_rewards(rows)

    return in_child(check)


def noticed_by_sanitizer(csrc: Path) -> str | None:
    """Return what the sanitizers find wrong in the emulator's cases."""
    library = simt_backend.build(csrc / "simt.so", csrc=csrc, flags=simt_backend.SANITIZED)
    result = subprocess.run(
        [sys.executable, "-m", "support.simt_checks", str(library), str(BLOCK)],
        env=simt_backend.sanitizer_environment(),
        capture_output=True,
        text=True,
    )
    return result.stderr if result.returncode else None


def noticed_by_ptx(csrc: Path) -> str | None:
    """Return what the interpreter finds wrong in what nvcc makes of the kernels."""
    kernels = ptx_backend.compile_kernels(csrc / "launch.ptx", csrc=csrc)
    rows = ptx_rows(kernels, block=BLOCK)

    def check() -> None:
        for name in NAMES:
            check_stats_and_gradient(rows, CASES[name])

    return in_child(check)


NOTICED: dict[Catcher, Callable[[Path], str | None]] = {
    "simt": noticed_by_simt,
    "sanitizer": noticed_by_sanitizer,
    "ptx": noticed_by_ptx,
}


def leave_out_other_blocks(csrc: Path) -> None:
    """Keep a copy of csrc from compiling the kernels for the blocks that aren't tried."""
    launch = csrc / "cuda" / "launch.cu"
    lines = launch.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not re.search(r"Block<(32|512|1024)>", line)]
    if len(kept) != len(lines) - 3:
        raise ValueError("launch.cu chooses the block in another way than it did")
    launch.write_text("".join(kept))


def outcome(mutant: Mutant, catcher: Catcher) -> tuple[bool, str]:
    """Return whether a mutant, and nothing else, was noticed as it should be, and a line on it."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(simt_backend.CSRC, csrc)
        leave_out_other_blocks(csrc)
        mutant.seed(csrc)
        found = NOTICED[catcher](csrc)
    expected = (found is None) == (mutant == AS_IS)
    what = "nothing" if found is None else first_error(found)
    return expected, f"{'ok  ' if expected else 'FAIL'} {mutant.name}, {catcher}: {what}"


def first_error(found: str) -> str:
    """Return the line of a message that says most."""
    lines = [line.strip() for line in found.splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line] or lines
    return told[0][:120]


def main() -> int:
    """Return the number of mutants that weren't noticed as they should be."""
    torch.set_num_threads(1)
    started = time.monotonic()
    usable = [
        *(["simt", "sanitizer"] if not simt_backend.why_not() else []),
        *(["ptx"] if not ptx_backend.why_not() else []),
    ]
    tasks = [
        (mutant, catcher)
        for mutant in (AS_IS, *MUTANTS)
        for catcher in mutant.caught_by
        if catcher in usable
    ]
    with ProcessPoolExecutor(max_workers=2, mp_context=FORK) as pool:
        failures = 0
        for expected, line in pool.map(outcome, *zip(*tasks, strict=True)):
            print(line, flush=True)
            failures += not expected
    seconds = time.monotonic() - started
    print(f"{len(MUTANTS)} bugs, {len(tasks)} checks, {failures} failures, {seconds:.0f} s")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 1))
