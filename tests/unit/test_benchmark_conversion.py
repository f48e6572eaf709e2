"""The benchmark of conversions runs and writes its figures; what they come to is no test."""

from pathlib import Path

import pytest
from support.benchmark_run import quick_figures


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path: Path) -> None:
    figures = quick_figures("conversion", tmp_path)
    for verb in ("import", "export"):
        assert figures[f"{verb}_vs_cp"] > 0
        assert figures[f"{verb}_peak_bytes"] > 10**8
        # torch itself and a few pieces of 4 MiB: far from the embedding twice, let alone a model.
        assert figures[f"{verb}_peak_bytes"] < figures["interpreter_bytes"] + 100 * 2**20
