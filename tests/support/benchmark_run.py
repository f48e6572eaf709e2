"""Runs a script of benchmarks/ as its users do."""

import json
import math
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Return how the script ended."""
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
    )


def quick_figures(script: str, folder: Path) -> dict[str, float]:
    """Return the figures that a quick run writes; all are finite and not below zero."""
    ended = run(script, "--quick", "--json", str(folder / "figures.json"))
    assert ended.returncode == 0, ended.stderr
    figures: dict[str, float] = json.loads((folder / "figures.json").read_text())
    assert all(0 <= figure < math.inf for figure in figures.values())
    return figures
