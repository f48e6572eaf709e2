"""What all benchmarks refuse before they measure anything."""

from pathlib import Path

import pytest
import torch
from support.benchmark_run import run


@pytest.mark.parametrize("script", ["attention", "layouts", "logprob"])
def test_a_file_that_can_not_be_written_is_refused_before_anything_is_measured(
    script: str, tmp_path: Path
) -> None:
    ended = run(script, "--json", str(tmp_path / "missing" / "figures.json"))
    assert ended.returncode == 2
    assert "missing is no folder" in ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["attention", "logprob"])
def test_a_gpu_that_is_not_there_is_refused(script: str) -> None:
    ended = run(script, "--device", "cuda")
    assert ended.returncode == 2
    assert "--device cuda: torch finds no GPU" in ended.stderr
