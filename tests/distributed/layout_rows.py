"""Short ways to write a row of the table of layouts."""

from typing import Any, NamedTuple

from training import Row

from poweropd_megatron.config.schema import ParallelConfig

OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}


class Case(NamedTuple):
    """A row, and the kinds of models that it is tested with: those of conftest.folders."""

    row: Row
    student: str
    teacher: str

    @property
    def name(self) -> str:
        """Return the row's name with the models' kinds, once where they are the same."""
        kinds = dict.fromkeys((self.student, self.teacher))
        return "-".join((self.row.name, *kinds))


def parallel(
    tensor: int = 1,
    pipeline: int = 1,
    *,
    virtual: int | None = None,
    expert: int = 1,
    context: int = 1,
    sequence: bool = False,
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=sequence,
    )


def row(
    name: str,
    world_size: int,
    student: ParallelConfig,
    teacher: ParallelConfig | None = None,
    *,
    micro_batch_size: int = 2,
    max_tokens_per_microbatch: int | None = None,
    use_distributed_optimizer: bool = True,
    teacher_ranks: int | None = None,
    offload: bool = False,
    **megatron: Any,
) -> Row:
    """Return a row whose teacher has the student's layout unless it is given its own."""
    return Row(
        name=name,
        world_size=world_size,
        student=student,
        teacher=teacher or student,
        micro_batch_size=micro_batch_size,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        use_distributed_optimizer=use_distributed_optimizer,
        teacher_ranks=teacher_ranks,
        offload=offload,
        megatron=megatron,
    )


def recompute(granularity: str, method: str, num_layers: int) -> dict[str, Any]:
    return {
        "recompute_granularity": granularity,
        "recompute_method": method,
        "recompute_num_layers": num_layers,
    }


ONE_PROCESS = row("one-process", 1, parallel())
