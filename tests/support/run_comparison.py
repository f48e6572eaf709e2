"""Whether two runs came to the same: bit by bit, or up to rounding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli_run import metrics
from torch import Tensor


def exported(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a run's export."""
    return {
        name: tensor
        for file in (folder / "export").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_bitwise_the_same(a: Path, b: Path) -> None:
    """Fail unless two runs have the same records and exports, but for times."""
    assert metrics(a) == metrics(b)
    for name in ("diagnostics.jsonl", "samples.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    tensors_a, tensors_b = exported(a), exported(b)
    assert tensors_a.keys() == tensors_b.keys()
    assert [name for name in tensors_a if not torch.equal(tensors_a[name], tensors_b[name])] == []


def assert_the_same_up_to_rounding(before: Path, folder: Path, *, after: int = 4) -> None:
    """Fail unless a run that went on after a step came to what another run came to."""
    there, here = metrics(before), metrics(folder)
    assert here[: after + 1] == there[: after + 1]
    for expected, found in zip(there[after + 1 :], here[after + 1 :], strict=True):
        assert found["num_tokens"] == expected["num_tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["reward/mean"] == pytest.approx(expected["reward/mean"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    expected_tensors = exported(before)
    for name, tensor in exported(folder).items():
        torch.testing.assert_close(tensor, expected_tensors[name], rtol=0, atol=1e-5)
