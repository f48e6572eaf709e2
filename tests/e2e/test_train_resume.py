"""Resuming by the command: bitwise after kill -9, and under another layout up to rounding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli_run import Ended, metrics, rewound, settings, steps_recorded, train
from torch import Tensor

from poweropd_megatron.checkpoint.store import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


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


def go_on(folder: Path, *, tp: int = 1, pp: int = 1, world_size: int | None = None) -> Ended:
    arguments = settings(folder, tp=tp, pp=pp)
    return train(arguments, world_size=world_size or tp * pp).expect(0)


def test_one_process_killed_and_resumed_is_bitwise_the_run_that_was_not(one, resumed_one):
    assert "training for 8 steps, going on after step 4" in resumed_one.ended.stdout
    assert_bitwise_the_same(one.folder, resumed_one.folder)


def test_two_tensor_parallel_ranks_killed_and_resumed_are_bitwise_the_run_that_was_not(
    tp2, resumed_tp2
):
    assert "training for 8 steps, going on after step 4" in resumed_tp2.ended.stdout
    assert_bitwise_the_same(tp2.folder, resumed_tp2.folder)


def test_two_data_parallel_ranks_resumed_are_bitwise_the_run_that_went_through(tmp_path):
    go_on(tmp_path / "straight", world_size=2)
    resumed = rewound(tmp_path / "straight", 4, tmp_path / "resumed")
    ended = go_on(resumed, world_size=2)
    assert "going on after step 4" in ended.stdout
    assert_bitwise_the_same(tmp_path / "straight", resumed)


def test_records_of_steps_that_a_kill_took_back_are_dropped(killed_one, resumed_one):
    assert max(steps_recorded(killed_one)) > 4
    assert steps_recorded(resumed_one.folder) == list(range(9))


@pytest.mark.parametrize(
    ("name", "tp", "pp", "num_files"), [("tp2", 1, 1, 1), ("one", 1, 2, 2)], ids=["TP2-1", "1-PP2"]
)
def test_a_killed_run_is_exported_bitwise_the_same_under_another_layout(
    name, tp, pp, num_files, tmp_path, request
):
    """The kill came between the last checkpoint and the export, so nothing is trained."""
    before = request.getfixturevalue(name).folder
    folder = rewound(before, 8, tmp_path / "run")
    go_on(folder, tp=tp, pp=pp)
    assert len(list((folder / "export").glob("*.safetensors"))) == num_files
    assert_bitwise_the_same(before, folder)


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [("tp2", 1, 1), ("one", 1, 2)], ids=["TP2-1", "1-PP2"]
)
def test_a_run_goes_on_under_another_layout_up_to_rounding(name, tp, pp, tmp_path, request):
    before = request.getfixturevalue(name).folder
    folder = rewound(before, 4, tmp_path / "run")
    go_on(folder, tp=tp, pp=pp)
    there, here = metrics(before), metrics(folder)
    assert here[:5] == there[:5]
    for expected, found in zip(there[5:], here[5:], strict=True):
        assert found["num_tokens"] == expected["num_tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["reward/mean"] == pytest.approx(expected["reward/mean"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    expected_tensors = exported(before)
    for name, tensor in exported(folder).items():
        torch.testing.assert_close(tensor, expected_tensors[name], rtol=0, atol=1e-5)
    assert CheckpointStore(folder / "checkpoints").steps() == [4, 8]
