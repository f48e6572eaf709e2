"""The benchmark of layouts runs and writes its figures; what they come to is no test."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PHASES = ("rollout", "teacher", "student")
WAYS = ("lock_step", "shrinking", "refilling")


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/layouts.py", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_quick_run_writes_every_figure(tmp_path: Path) -> None:
    run = benchmark("--quick", "--json", str(tmp_path / "figures.json"))
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(0 <= figure < math.inf for figure in figures.values())
    for layout in ("one_process", "TP2", "PP2", "PP2xVPP2", "DP2"):
        phases = [figures[f"{layout}_{phase}_seconds"] for phase in PHASES]
        assert min(phases) > 0
        assert sum(phases) <= figures[f"{layout}_step_seconds"]
        assert figures[f"{layout}_communication_seconds"] < figures[f"{layout}_step_seconds"]
    assert figures["TP2_communication_seconds"] > figures["one_process_communication_seconds"]
    assert figures["padding_fraction_packed"] < 0.01 < figures["padding_fraction_padded"]
    assert {"refilling_gain", "refilling_gain_over_shrinking", "groups_gain"} <= set(figures)
    # Counted, not timed.
    lock_step, shrinking, refilling = (figures[f"{way}_rows_per_token"] for way in WAYS)
    assert shrinking == 1
    assert 1 <= refilling < lock_step


def test_a_file_that_can_not_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    run = benchmark("--json", str(tmp_path / "missing" / "figures.json"))
    assert run.returncode == 2
    assert "missing is no folder" in run.stderr
