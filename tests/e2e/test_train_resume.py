"""Resuming by the command: bitwise after kill -9, and under another layout up to rounding."""

from pathlib import Path

import pytest
from support.cli_run import Ended, rewound, settings, steps_recorded, train
from support.run_comparison import assert_bitwise_the_same, assert_the_same_up_to_rounding

from poweropd_megatron.checkpoint.store import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


VIRTUAL = ("--student.parallel.virtual_pipeline_model_parallel_size=2",)
UNEVEN = (
    "--student.megatron.num_layers_in_first_pipeline_stage=1",
    "--student.megatron.overlap_grad_reduce=true",
)


def go_on(
    folder: Path, *changes: str, tp: int = 1, pp: int = 1, world_size: int | None = None
) -> Ended:
    arguments = settings(folder, *changes, tp=tp, pp=pp)
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


OVERLAPPED = (
    "--student.megatron.overlap_grad_reduce=true",
    "--student.megatron.overlap_param_gather=true",
)
ONE_PROMPT = ("--eval.interval=1", "--eval.max_prompts=1", "--eval.num_samples=0")
"""One of two ranks has nothing to evaluate, right after it has updated its share of the weights."""


@pytest.fixture(scope="module")
def not_overlapped(runs):
    go_on(runs / "not_overlapped", *ONE_PROMPT, world_size=2)
    return runs / "not_overlapped"


def test_a_run_that_overlaps_its_communication_is_bitwise_the_run_that_does_not(
    not_overlapped, tmp_path
):
    go_on(tmp_path / "run", *ONE_PROMPT, *OVERLAPPED, world_size=2)
    assert_bitwise_the_same(not_overlapped, tmp_path / "run")


def test_a_run_goes_on_in_buckets_that_are_sent_one_by_one(not_overlapped, tmp_path):
    folder = rewound(not_overlapped, 4, tmp_path / "run")
    buckets = "--student.megatron.bucket_size=20000"
    go_on(folder, *ONE_PROMPT, *OVERLAPPED, buckets, world_size=2)
    assert_the_same_up_to_rounding(not_overlapped, folder)


def test_records_of_steps_that_a_kill_took_back_are_dropped(killed_one, resumed_one):
    assert max(steps_recorded(killed_one)) > 4
    assert steps_recorded(resumed_one.folder) == list(range(9))


def test_two_virtual_stages_on_two_ranks_resumed_are_bitwise_the_run_that_went_through(
    vpp2, tmp_path
):
    resumed = rewound(vpp2.folder, 4, tmp_path / "resumed")
    ended = go_on(resumed, *VIRTUAL, pp=2)
    assert "going on after step 4" in ended.stdout
    assert_bitwise_the_same(vpp2.folder, resumed)


CP2 = tuple(f"--{model}.parallel.context_parallel_size=2" for model in ("student", "teacher"))


def test_a_run_of_two_context_parallel_ranks_goes_on_there_bitwise_and_on_one_up_to_rounding(
    tmp_path,
):
    ended = go_on(tmp_path / "straight", *CP2, world_size=2)
    assert "TP 1 x PP 1 x CP 2" in ended.stdout
    resumed, alone = (rewound(tmp_path / "straight", 4, tmp_path / name) for name in ("2", "1"))
    assert "going on after step 4" in go_on(resumed, *CP2, world_size=2).stdout
    assert_bitwise_the_same(tmp_path / "straight", resumed)
    go_on(alone)
    assert_the_same_up_to_rounding(tmp_path / "straight", alone)


@pytest.mark.parametrize(
    ("name", "changes", "pp", "num_files"),
    [
        ("tp2", (), 1, 1),
        ("one", (), 2, 2),
        ("vpp2", (), 1, 1),
        ("one", VIRTUAL, 2, 2),
        ("vpp2", UNEVEN, 2, 2),
    ],
    ids=["TP2-1", "1-PP2", "PP2xVPP2-1", "1-PP2xVPP2", "PP2xVPP2-uneven-PP2"],
)
def test_a_killed_run_is_exported_bitwise_the_same_under_another_layout(
    name, changes, pp, num_files, tmp_path, request
):
    """The kill came between the last checkpoint and the export, so nothing is trained."""
    before = request.getfixturevalue(name).folder
    folder = rewound(before, 8, tmp_path / "run")
    go_on(folder, *changes, pp=pp)
    assert len(list((folder / "export").glob("*.safetensors"))) == num_files
    assert_bitwise_the_same(before, folder)


@pytest.mark.parametrize(
    ("name", "changes", "pp"),
    [("tp2", (), 1), ("one", (), 2), ("vpp2", (), 1), ("one", VIRTUAL, 2)],
    ids=["TP2-1", "1-PP2", "PP2xVPP2-1", "1-PP2xVPP2"],
)
def test_a_run_goes_on_under_another_layout_up_to_rounding(name, changes, pp, tmp_path, request):
    before = request.getfixturevalue(name).folder
    folder = rewound(before, 4, tmp_path / "run")
    go_on(folder, *changes, pp=pp)
    assert_the_same_up_to_rounding(before, folder)
    assert CheckpointStore(folder / "checkpoints").steps() == [4, 8]
