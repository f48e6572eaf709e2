"""Which of the job's ranks hold which model, and whether the layouts fit them."""

import math
from typing import Literal

from poweropd_megatron.config.choices import divisors, listed, multiples_around
from poweropd_megatron.config.experts import check_expert_ranks
from poweropd_megatron.config.schema import ParallelConfig, TrainConfig
from poweropd_megatron.errors import ConfigError


def student_ranks(config: TrainConfig, world_size: int) -> range:
    """Return the ranks that hold the student: all, or the first with a teacher on its own."""
    return range(world_size - (config.teacher.num_ranks or 0))


def teacher_ranks(config: TrainConfig, world_size: int) -> range:
    """Return the ranks that hold the teacher: all, or the last teacher.num_ranks."""
    return range(world_size - (config.teacher.num_ranks or world_size), world_size)


def check_ranks(config: TrainConfig, world_size: int) -> None:
    """Return if both layouts fit the ranks that they have, and the batch the student's.

    Raises: ConfigError that names the settings and what would work.
    """
    num_ranks = config.teacher.num_ranks
    if num_ranks is not None and num_ranks >= world_size:
        working = _working(config, world_size)
        fix = f"set it to {listed(working)}, " if working else ""
        raise ConfigError(
            f"teacher.num_ranks = {num_ranks} leaves none of {world_size} ranks for the student: "
            f"{fix}start at least {num_ranks + config.student.parallel.model_parallel_size} ranks, "
            "or leave it out, and both models share all ranks"
        )
    _check_fit("student", config, world_size)
    _check_fit("teacher", config, world_size)
    _check_batch(config, len(student_ranks(config, world_size)))
    _check_group_size(config, len(student_ranks(config, world_size)))


def check_fit(
    name: Literal["student", "teacher"],
    parallel: ParallelConfig,
    num_ranks: int,
    fix: str | None = None,
) -> None:
    """Return if copies of a model fit num_ranks ranks.

    fix: the ranks in words, and what to change; by default the start of other ones.
    Raises: ConfigError that names the settings and what would work.
    """
    size = parallel.model_parallel_size
    if num_ranks % size:
        sizes = {
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        }
        if parallel.context_parallel_size > 1:
            sizes["context_parallel_size"] = parallel.context_parallel_size
        product = " times ".join(
            f"{name}.parallel.{setting} = {value}" for setting, value in sizes.items()
        )
        raise ConfigError(
            f"{product} must divide the number of {fix or _other_ranks(parallel, num_ranks)}"
        )
    check_expert_ranks(name, parallel, num_ranks)


def _check_fit(name: Literal["student", "teacher"], config: TrainConfig, world_size: int) -> None:
    parallel: ParallelConfig = getattr(config, name).parallel
    ranks_of = {"student": student_ranks, "teacher": teacher_ranks}[name]
    num_ranks = len(ranks_of(config, world_size))
    check_fit(name, parallel, num_ranks, _fix(name, config, world_size, num_ranks))


def _fix(name: str, config: TrainConfig, world_size: int, num_ranks: int) -> str:
    """Return the ranks that a model has, and what to change so that its layout fits them."""
    own = config.teacher.num_ranks
    if own is None:
        return _other_ranks(getattr(config, name).parallel, num_ranks)
    sizes = f"or choose sizes whose product is {listed(divisors(num_ranks))}"
    working = _working(config, world_size)
    fix = f"set teacher.num_ranks to {listed(working)}, " if working else ""
    return (
        f"the {name}'s ranks ({num_ranks} of {world_size}, with teacher.num_ranks = {own}): "
        f"{fix}{sizes}"
    )


def _other_ranks(parallel: ParallelConfig, num_ranks: int) -> str:
    fitting = listed(multiples_around(num_ranks, parallel.model_parallel_size))
    product = listed(divisors(num_ranks))
    return f"ranks ({num_ranks}): start {fitting} ranks, or choose sizes whose product is {product}"


def _working(config: TrainConfig, world_size: int) -> list[int]:
    """Return the values of teacher.num_ranks at which both layouts fit their ranks."""
    student = config.student.parallel.model_parallel_size
    teacher = config.teacher.parallel.model_parallel_size
    return [
        count
        for count in range(teacher, world_size, teacher)
        if (world_size - count) % student == 0
    ]


def _check_batch(config: TrainConfig, num_ranks: int) -> None:
    name = "global_batch_size" if config.mini_batch_size is None else "mini_batch_size"
    batch, micro = getattr(config, name), config.micro_batch_size
    data_parallel = num_ranks // config.student.parallel.model_parallel_size
    own = config.teacher.num_ranks
    ranks = f"{num_ranks} ranks" + (f" beside teacher.num_ranks = {own}" if own else "")
    ranks += f" / {config.student.parallel.model_parallel_size} model-parallel"
    if config.max_tokens_per_microbatch is not None:
        if batch < data_parallel:
            raise ConfigError(
                f"{name} = {batch} must be at least the student's data-parallel size = "
                f"{data_parallel} ({ranks}): each rank needs a response"
            )
        return
    if batch % (micro * data_parallel):
        working = _working_batches(config, micro * data_parallel)
        fixes = [f"{name} to {listed(working)}"] if working else []
        if batch % data_parallel == 0:
            fixes.append(f"micro_batch_size to {listed(divisors(batch // data_parallel))}")
        raise ConfigError(
            f"{name} = {batch} must be a multiple of micro_batch_size = {micro} times "
            f"the student's data-parallel size = {data_parallel} ({ranks})"
            + (f": set {', or '.join(fixes)}" if fixes else "")
        )


def _check_group_size(config: TrainConfig, num_ranks: int) -> None:
    """Refuse groups that a step doesn't fill: the rest would be micro-batches of padding."""
    size = config.student.megatron.get("microbatch_group_size_per_vp_stage")
    batch = config.mini_batch_size or config.global_batch_size
    data_parallel = num_ranks // config.student.parallel.model_parallel_size
    most = batch // data_parallel
    per = "of a sequence each"
    if config.max_tokens_per_microbatch is None:
        most //= config.micro_batch_size
        per = f"with micro_batch_size = {config.micro_batch_size}"
    if isinstance(size, int) and size > most:
        raise ConfigError(
            f"student.megatron.microbatch_group_size_per_vp_stage = {size} is more than the {most} "
            f"micro-batches of a rank's step ({batch} responses over a data-parallel size of "
            f"{data_parallel}, {per}): set it to at most {most}, or leave it out"
        )


def _working_batches(config: TrainConfig, multiple: int) -> list[int]:
    """Return what mini_batch_size, or else global_batch_size, could be as a multiple of this."""
    batch = config.global_batch_size
    if config.mini_batch_size is not None:
        return [size for size in divisors(batch) if size % multiple == 0]
    return multiples_around(batch, math.lcm(multiple, config.rollout.num_samples_per_prompt))
