"""Which models a tensor- and pipeline-parallel layout can cut, and what a refusal offers."""

import pytest

from poweropd_megatron.config.rules import check_model_layout
from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.errors import ConfigError

SHAPE = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "kv_channels": 128,
    "ffn_hidden_size": 6144,
    "num_moe_experts": None,
}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3, 1), "tensor_model_parallel_size = 3 must divide the student's attention heads (16)"),
        ((32, 1), "size = 32 must divide the student's attention heads (16); 1, 2, 4, 8 or 16 "),
        ((1, 3), "pipeline_model_parallel_size = 3 must divide the student's layers (28); 1, 2, 4"),
    ],
)
def test_a_layout_must_be_able_to_cut_the_model(sizes, words):
    parallel = ParallelConfig(
        tensor_model_parallel_size=sizes[0], pipeline_model_parallel_size=sizes[1]
    )
    with pytest.raises(ConfigError) as caught:
        check_model_layout("student", parallel, {}, **SHAPE)
    assert words in str(caught.value)
    assert str(caught.value).startswith("student.parallel.")


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "channels", "size", "words"),
    [
        (24, 8, 96, 12, "divide the student's key-value heads (8), or be a multiple; 1, 2, 4, 8"),
        (24, 8, 96, 24, None),
        (16, 2, 1, 8, "divide the rows of the student's linear_qkv (20); 1, 2 or 4 would work"),
    ],
)
def test_key_value_heads_may_be_shared_by_ranks_but_not_cut(
    heads, key_value_heads, channels, size, words
):
    shape = {
        **SHAPE,
        "num_attention_heads": heads,
        "num_query_groups": key_value_heads,
        "kv_channels": channels,
    }
    parallel = ParallelConfig(tensor_model_parallel_size=size)
    if words is None:
        check_model_layout("student", parallel, {}, **shape)
        return
    with pytest.raises(ConfigError) as caught:
        check_model_layout("student", parallel, {}, **shape)
    assert f"student.parallel.tensor_model_parallel_size = {size} must {words}" in str(caught.value)


def test_the_feed_forward_size_must_divide_too():
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with pytest.raises(
        ConfigError, match=r"teacher\.parallel.*feed-forward size \(6145\); 1 would"
    ):
        check_model_layout("teacher", parallel, {}, **{**SHAPE, "ffn_hidden_size": 6145})
    check_model_layout("teacher", parallel, {}, **SHAPE)


def test_ranks_that_exchange_sequences_for_heads_must_divide_the_models_heads():
    parallel = ParallelConfig(tensor_model_parallel_size=4, context_parallel_size=4)
    check_model_layout("teacher", parallel, {"cp_comm_type": "p2p"}, **SHAPE)
    with pytest.raises(ConfigError, match="the 4 query heads and the 2 key-value heads"):
        check_model_layout("teacher", parallel, {"cp_comm_type": "a2a"}, **SHAPE)
