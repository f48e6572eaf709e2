"""Which ranks hold which model; what can't be is refused with what would work."""

from pathlib import Path

import pytest
from support.run_settings import small_run

from poweropd_megatron.config.ranks import student_ranks, teacher_ranks
from poweropd_megatron.config.rules import check
from poweropd_megatron.config.schema import ParallelConfig, TrainConfig
from poweropd_megatron.errors import ConfigError


def run_on(num_teacher_ranks: int | None, **top: int) -> TrainConfig:
    """Return a run whose student has TP 2 and whose teacher PP 3."""
    config = small_run(Path("student"), Path("teacher"), **{"global_batch_size": 24, **top})
    config.teacher.num_ranks = num_teacher_ranks
    config.student.parallel = ParallelConfig(tensor_model_parallel_size=2)
    config.teacher.parallel = ParallelConfig(pipeline_model_parallel_size=3)
    return config


def message_of(config: TrainConfig, world_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        check(config, world_size)
    return str(caught.value)


def test_the_teacher_has_the_last_ranks_or_shares_all():
    assert student_ranks(run_on(3), 9) == range(6)
    assert teacher_ranks(run_on(3), 9) == range(6, 9)
    assert student_ranks(run_on(None), 6) == teacher_ranks(run_on(None), 6) == range(6)


@pytest.mark.parametrize(("own", "world_size"), [(3, 5), (3, 9), (6, 8), (None, 6)])
def test_layouts_that_fit_their_ranks_are_accepted(own, world_size):
    check(run_on(own), world_size)


def test_a_teacher_that_leaves_no_rank_for_the_student_is_refused():
    assert message_of(run_on(9), 9) == (
        "teacher.num_ranks = 9 leaves none of 9 ranks for the student: set it to 3, start at "
        "least 11 ranks, or leave it out, and both models share all ranks"
    )
    assert "leaves none of 1 ranks for the student: start at least 8" in message_of(run_on(6), 1)


def test_a_teacher_that_does_not_fit_its_ranks_is_refused():
    assert message_of(run_on(4), 8) == (
        "teacher.parallel.tensor_model_parallel_size = 1 times "
        "teacher.parallel.pipeline_model_parallel_size = 3 must divide the number of the teacher's "
        "ranks (4 of 8, with teacher.num_ranks = 4): set teacher.num_ranks to 6, or choose sizes "
        "whose product is 1, 2 or 4"
    )


def test_a_student_that_does_not_fit_the_other_ranks_is_refused():
    message = message_of(run_on(3), 8)
    assert message.startswith("student.parallel.tensor_model_parallel_size = 2 times")
    assert "the student's ranks (5 of 8, with teacher.num_ranks = 3)" in message
    assert message.endswith("set teacher.num_ranks to 6, or choose sizes whose product is 1 or 5")


def test_the_batch_is_shared_by_the_students_ranks_alone():
    check(run_on(3, global_batch_size=4), 7)
    assert message_of(run_on(3, global_batch_size=4), 9) == (
        "global_batch_size = 4 must be a multiple of micro_batch_size = 2 times the student's "
        "data-parallel size = 3 (6 ranks beside teacher.num_ranks = 3 / 2 model-parallel): set "
        "global_batch_size to 6"
    )


def test_experts_are_shared_within_a_models_own_ranks():
    config = run_on(3)
    config.student.parallel = ParallelConfig(expert_model_parallel_size=4)
    check(config, 7)
    assert "ranks of a pipeline stage (3)" in message_of(config, 6)


def test_parts_need_a_teacher_on_ranks_of_its_own_and_divide_the_batch():
    config = run_on(None)
    config.rollout.num_parts = 2
    assert message_of(config, 6).startswith("rollout.num_parts = 2 needs teacher.num_ranks: ")
    config = run_on(3)
    config.rollout.num_parts = 5
    assert message_of(config, 9) == (
        "rollout.num_parts = 5 must divide global_batch_size = 24; 1, 2, 3, 4, 6, 8, 12 or 24 "
        "would work"
    )


def test_a_teacher_on_ranks_of_its_own_has_nobody_to_make_room_for():
    config = run_on(3)
    config.teacher.offload = True
    assert "teacher.num_ranks = 3 is on other ranks: leave out either" in message_of(config, 9)
    config = run_on(None)
    config.teacher.offload = True
    check(config, 6)


@pytest.mark.parametrize(
    ("size", "top", "most"),
    [
        (3, {"micro_batch_size": 2}, 6),
        (6, {"micro_batch_size": 2}, 6),
        (7, {"micro_batch_size": 2}, 6),
        (7, {"micro_batch_size": 2, "max_tokens_per_microbatch": 100}, 12),
        (13, {"micro_batch_size": 2, "max_tokens_per_microbatch": 100}, 12),
        (4, {"micro_batch_size": 2, "mini_batch_size": 12}, 3),
    ],
)
def test_a_group_of_micro_batches_is_no_larger_than_a_step(size, top, most):
    """Four ranks in two stages: two copies of the student share 24 responses, or a mini-batch."""
    config = run_on(None, **top)
    config.student.parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    config.teacher.parallel = ParallelConfig()
    config.student.megatron = {"microbatch_group_size_per_vp_stage": size}
    if size <= most:
        check(config, 4)
        return
    message = message_of(config, 4)
    assert f"microbatch_group_size_per_vp_stage = {size} is more than the {most} micro" in message
    assert f"set it to at most {most}, or leave it out" in message
