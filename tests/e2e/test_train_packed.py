"""A run on packed micro-batches is the padded run, to rounding, with less padding."""

from pathlib import Path

import pytest
from support.cli_run import metrics, settings, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROUNDING = 1e-4
"""Relative: three steps of Adam carry fp32's rounding that far."""
PADDING = {"student/padding_fraction", "teacher/padding_fraction"}


def test_packed_and_padded_runs_have_the_same_metrics_but_for_the_padding(tmp_path: Path) -> None:
    packed = ("--max_tokens_per_microbatch=200", "--teacher.max_tokens_per_microbatch=30")
    said, recorded = [], []
    for name, more in (("padded", ()), ("packed", packed)):
        arguments = settings(tmp_path / name, "--eval.interval=3", *more, steps=3, tp=2)
        said.append(train(arguments, world_size=2).expect(0).stdout)
        recorded.append(metrics(tmp_path / name))
    for padded, found in zip(*recorded, strict=True):
        values = [{k: v for k, v in line.items() if k not in PADDING} for line in (padded, found)]
        assert values[1] == pytest.approx(values[0], rel=ROUNDING, abs=1e-5)
    for padded, found in zip(*(records[1:] for records in recorded), strict=True):
        assert all(padded[name] > 0.01 for name in PADDING)
        assert all(found[name] == 0 for name in PADDING)
    assert "packed into micro-batches of up to 200 tokens" in said[1]
    assert "packed into micro-batches" not in said[0]
    assert "exceed teacher.max_tokens_per_microbatch = 30" in said[1]
