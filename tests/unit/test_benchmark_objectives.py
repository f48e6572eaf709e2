"""The benchmark of objectives runs and writes its figures; what they come to is no test."""

from pathlib import Path

import pytest
from support.benchmark_run import quick_figures

FIGURES = {
    *("reverse_kl_peak_ratio", "power_exact_peak_ratio", "dense_peak_ratio"),
    *("reverse_kl_time_ratio", "power_exact_time_ratio", "forward_kl_time_ratio"),
}


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path: Path) -> None:
    figures = quick_figures("objectives", tmp_path)
    assert set(figures) >= FIGURES
    assert min(figures.values()) > 0
