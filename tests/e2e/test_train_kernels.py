"""The compiled kernels and plain torch train alike, and a run says which of them it uses."""

from pathlib import Path

import pytest
from support.cli_run import Ended, metrics, settings, train

from poweropd_megatron.ops.backends import compiled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROUNDING = 1e-4
"""Relative: three steps of Adam carry fp32's rounding that far."""


def run(folder: Path, kernels: str) -> Ended:
    arguments = settings(folder, "--eval.interval=3", steps=3, tp=2)
    return train(arguments, world_size=2, POWEROPD_OPS=kernels)


def test_compiled_kernels_and_plain_torch_give_the_same_metrics(tmp_path: Path) -> None:
    if isinstance(compiled("cpu"), str):
        pytest.skip("no compiled module")
    said = {
        "": "kernels: compiled, for cpu",
        "torch": "kernels: plain torch, as POWEROPD_OPS=torch asks",
    }
    for kernels, line in said.items():
        ended = run(tmp_path / f"run-{kernels}", kernels).expect(0)
        assert line in ended.stdout
        assert "attention: torch's, for Transformer Engine " in ended.stdout
        assert line in (tmp_path / f"run-{kernels}" / "train.log").read_text()
    ours, torchs = (metrics(tmp_path / f"run-{kernels}") for kernels in said)
    assert [record["step"] for record in ours] == [0, 1, 2, 3]
    for record, reference in zip(ours, torchs, strict=True):
        assert record == pytest.approx(reference, rel=ROUNDING, abs=1e-5)


def test_kernels_that_do_not_exist_end_the_run_before_it_starts(tmp_path: Path) -> None:
    ended = run(tmp_path / "run", "garbage").expect(2)
    assert "POWEROPD_OPS=garbage: expected torch, or leave it unset" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
