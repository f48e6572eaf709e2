"""The benchmark of layouts runs and writes its figures; what they come to is no test."""

import os
from pathlib import Path

import pytest
from support.benchmark_run import quick_figures

PHASES = ("rollout", "teacher", "student")
WAYS = ("lock_step", "shrinking", "refilling")


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_quick_run_writes_every_figure(tmp_path: Path) -> None:
    figures = quick_figures("layouts", tmp_path)
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
