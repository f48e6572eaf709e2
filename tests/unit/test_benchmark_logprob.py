"""The benchmark of log-probs runs and writes its figures; what they come to is no test."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FIGURES = {
    *("fwd_vs_compile", "fwd_vs_compile_fp32", "fwdbwd_vs_compile", "fwdbwd_vs_compile_fp32"),
    *("fwdbwd_vs_mcore_fused", "fwdbwd_vs_mcore_fused_fp32", "fp32_read_fraction"),
    *("extra_bytes_per_token", "fused_head_peak_ratio", "fused_head_time_ratio"),
}


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/logprob.py", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path: Path) -> None:
    run = benchmark("--quick", "--json", str(tmp_path / "figures.json"))
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) >= FIGURES
    assert all(0 < figure < math.inf for figure in figures.values())
    # 24 bytes a token for the softmaxes and 16 for their states: no room for a copy of the logits.
    assert figures["extra_bytes_per_token"] <= 64


def test_a_file_that_can_not_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    run = benchmark("--json", str(tmp_path / "missing" / "figures.json"))
    assert run.returncode == 2
    assert "missing is no folder" in run.stderr
