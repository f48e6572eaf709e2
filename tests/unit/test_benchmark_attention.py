"""The benchmark of attention runs and writes its figures; what they come to is no test."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/attention.py", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path: Path) -> None:
    run = benchmark("--quick", "--json", str(tmp_path / "figures.json"))
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) >= {"attention_peak_ratio", "attention_time_ratio", "padding_saved"}
    assert all(0 <= figure < math.inf for figure in figures.values())
    # What is left rounds each micro-batch up to a multiple of 8.
    assert figures["padding_saved"] > 0.05
    assert figures["padding_fraction_packed"] < 0.01


def test_a_file_that_can_not_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    run = benchmark("--json", str(tmp_path / "missing" / "figures.json"))
    assert run.returncode == 2
    assert "missing is no folder" in run.stderr
