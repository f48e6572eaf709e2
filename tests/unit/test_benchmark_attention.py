"""The benchmark of attention runs and writes its figures; what they come to is no test."""

from pathlib import Path

import pytest
from support.benchmark_run import quick_figures


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path: Path) -> None:
    figures = quick_figures("attention", tmp_path)
    assert set(figures) >= {"attention_peak_ratio", "attention_time_ratio", "padding_saved"}
    # What is left rounds each micro-batch up to a multiple of 8.
    assert figures["padding_saved"] > 0.05
    assert figures["padding_fraction_packed"] < 0.01
