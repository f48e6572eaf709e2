"""Which ranks can share a model's experts; what else is refused, with what would work."""

from pathlib import Path

import pytest
from support.run_settings import small_run

from poweropd_megatron.config.rules import check, check_model_layout
from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.errors import ConfigError

DENSE = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "kv_channels": 128,
    "ffn_hidden_size": 6144,
    "num_moe_experts": None,
}
EXPERTS = DENSE | {"num_moe_experts": 6, "ffn_hidden_size": 6145}


@pytest.mark.parametrize(
    ("shape", "sizes", "words"),
    [
        (DENSE, (1, 2, False), "student.path is a dense model: set it to 1"),
        (EXPERTS, (1, 4, False), "must divide the student's experts (6); 1 or 2 would"),
        (EXPERTS, (2, 2, False), "needs student.parallel.sequence_parallel = true: set that"),
    ],
)
def test_experts_that_cannot_be_shared_are_refused_with_what_would_work(shape, sizes, words):
    tensor, expert, sequence = sizes
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        sequence_parallel=sequence,
    )
    with pytest.raises(ConfigError) as caught:
        check_model_layout("student", parallel, {}, **shape)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("num_experts", "module", "other", "kind"),
    [(None, "moe", "mlp", "a dense model"), (6, "mlp", "moe", "a model with experts")],
)
def test_a_feed_forward_that_the_model_does_not_have_is_not_computed_again(
    num_experts, module, other, kind
):
    shape = {**EXPERTS, "num_moe_experts": num_experts, "ffn_hidden_size": 8}
    for modules in (["core_attn", other], None):
        megatron = {"recompute_modules": modules}
        check_model_layout("student", ParallelConfig(), megatron, **shape)
    with pytest.raises(ConfigError) as caught:
        check_model_layout("student", ParallelConfig(), {"recompute_modules": [module]}, **shape)
    assert str(caught.value) == (
        f"student.megatron.recompute_modules has '{module}', but student.path is {kind}, whose "
        f"feed-forward is '{other}': name that, or leave it out"
    )


@pytest.mark.parametrize("sizes", [(1, 1, False), (1, 3, False), (2, 6, True), (2, 1, True)])
def test_experts_need_no_feed_forward_size_that_tensor_parallelism_divides(sizes):
    tensor, expert, sequence = sizes
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        sequence_parallel=sequence,
    )
    check_model_layout("teacher", parallel, {}, **EXPERTS)


def check_ranks_of(name: str, tensor: int, pipeline: int, expert: int) -> None:
    """Check a run of twelve ranks in which one model has a layout of its own."""
    config = small_run(Path("student"), Path("teacher"), global_batch_size=24)
    getattr(config, name).parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
    )
    check(config, 12)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "expert", "words"),
    [
        (1, 1, 5, "ranks of a pipeline stage (12)"),
        (1, 1, 8, "1, 2, 3, 4, 6 or 12 would work"),
        (1, 2, 12, "ranks of a pipeline stage (6)"),
        (2, 1, 3, "tensor_model_parallel_size = 2; 1, 2, 4, 6 or 12 would work"),
    ],
)
def test_ranks_that_cannot_share_experts_are_refused_with_sizes_that_can(
    tensor, pipeline, expert, words
):
    with pytest.raises(ConfigError) as caught:
        check_ranks_of("teacher", tensor, pipeline, expert)
    message = str(caught.value)
    assert message.startswith(f"teacher.parallel.expert_model_parallel_size = {expert} must divide")
    assert words in message


@pytest.mark.parametrize(("tensor", "expert"), [(1, 4), (2, 4), (4, 2), (4, 12), (2, 2)])
def test_ranks_that_can_share_experts_are_accepted(tensor, expert):
    check_ranks_of("student", tensor, 1, expert)
