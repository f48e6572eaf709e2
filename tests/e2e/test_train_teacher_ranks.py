"""Runs whose teacher has ranks of its own: four ranks, two for each model."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.cli_run import REPO, Ended, metrics, records, rewound, settings, steps_recorded, train
from support.run_comparison import assert_bitwise_the_same, assert_the_same_up_to_rounding

from poweropd_megatron.checkpoint.store import CheckpointStore, verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OWN_RANKS = (
    "--teacher.num_ranks=2",
    "--rollout.num_parts=2",
    "--student.parallel.tensor_model_parallel_size=2",
    "--teacher.parallel.pipeline_model_parallel_size=2",
)


def run(folder: Path, *changes: str, world_size: int = 4) -> Ended:
    return train(settings(folder, *changes), world_size=world_size).expect(0)


@pytest.fixture(scope="module")
def disjoint(runs):
    ended = run(runs / "disjoint", *OWN_RANKS)
    assert "TP 1 x PP 2, on 2 ranks of its own" in ended.stdout
    return runs / "disjoint"


def test_two_ranks_of_the_student_and_two_of_the_teacher_come_to_what_one_process_does(
    disjoint, one
):
    assert_the_same_up_to_rounding(one.folder, disjoint, after=0)


def test_each_record_and_file_is_written_once(disjoint):
    assert steps_recorded(disjoint) == list(range(9))
    assert [record["step"] for record in records(disjoint / "diagnostics.jsonl")] == [2, 4, 6, 8]
    store = CheckpointStore(disjoint / "checkpoints")
    assert store.steps() == [4, 8]
    verify(store.path(8))


def test_the_metrics_tell_how_long_the_teacher_scored_while_others_worked(disjoint):
    for record in records(disjoint / "metrics.jsonl")[1:]:
        assert record["time/teacher_busy_seconds"] > 0


def test_a_resumed_run_is_bitwise_the_run_that_went_through(disjoint, tmp_path):
    resumed = rewound(disjoint, 4, tmp_path / "resumed")
    assert "going on after step 4" in run(resumed, *OWN_RANKS).stdout
    assert_bitwise_the_same(disjoint, resumed)


def test_one_process_goes_on_with_the_run_and_the_other_way_round(disjoint, one, tmp_path):
    resumed = rewound(disjoint, 4, tmp_path / "resumed")
    run(resumed, world_size=1)
    assert_the_same_up_to_rounding(disjoint, resumed)
    resumed = rewound(one.folder, 4, tmp_path / "disjoint")
    run(resumed, *OWN_RANKS)
    assert_the_same_up_to_rounding(one.folder, resumed)


def test_a_teacher_that_leaves_the_device_changes_no_bit(one, tmp_path):
    folder = tmp_path / "run"
    ended = run(folder, "--teacher.offload=true", world_size=1)
    assert "in CPU memory between scores" in ended.stdout
    assert_bitwise_the_same(one.folder, folder)
    for record in records(folder / "metrics.jsonl")[1:]:
        assert record["memory/teacher_offloaded_bytes"] > 100_000
        assert record["time/teacher_load_seconds"] > 0
    assert metrics(folder)


CHANGES_A_WEIGHT = """
import sys
from poweropd_megatron.cli.main import main
from poweropd_megatron.train.teacher import Teacher

score = Teacher.score_own

def score_and_change_a_weight(self, *batch):
    found = score(self, *batch)
    next(self.chunks[-1].parameters()).data.view(-1)[0] += 1
    return found

Teacher.score_own = score_and_change_a_weight
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_whose_teachers_weights_change_says_so_at_its_end(tmp_path):
    changes = ("--data.eval_files=[]", "--eval.interval=0")
    arguments = settings(tmp_path / "run", *changes, steps=3)
    command = [sys.executable, "-c", CHANGES_A_WEIGHT, "train", *arguments]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "the teacher's weights have changed during the run" in ended.stderr
    assert steps_recorded(tmp_path / "run") == [0, 1, 2, 3]
