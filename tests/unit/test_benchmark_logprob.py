"""The benchmark of log-probs runs and writes its figures; what they come to is no test."""

from pathlib import Path

import pytest
from support.benchmark_run import quick_figures

FIGURES = {
    *("fwd_vs_compile", "fwd_vs_compile_fp32", "fwdbwd_vs_compile", "fwdbwd_vs_compile_fp32"),
    *("fwdbwd_vs_mcore_fused", "fwdbwd_vs_mcore_fused_fp32", "fp32_read_fraction"),
    *("extra_bytes_per_token", "fused_head_peak_ratio", "fused_head_time_ratio"),
}


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path: Path) -> None:
    figures = quick_figures("logprob", tmp_path)
    assert set(figures) >= FIGURES
    assert min(figures.values()) > 0
    # 24 bytes a token for the softmaxes and 16 for their states: no room for a copy of the logits.
    assert figures["extra_bytes_per_token"] <= 64
