"""Layers over stages and chunks: accepted exactly where Megatron can deal them out."""

import re
from itertools import product
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from poweropd_megatron.config.pipeline import EMBEDDING, FIRST, LAST, LOSS, check_pipeline
from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.errors import ConfigError


def layout(stages: int, chunks: int | None = None) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks
    )


def message_of(parallel: ParallelConfig, megatron: dict[str, Any], num_layers: int) -> str | None:
    try:
        check_pipeline("student", parallel, megatron, num_layers)
    except ConfigError as error:
        return str(error)
    return None


def megatron_deals_out(
    parallel: ParallelConfig, megatron: dict[str, Any], num_layers: int
) -> list[list[int]] | None:
    """Return the layers of each chunk in the order of the forward; None where Megatron can't."""
    stages, chunks = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    try:
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=chunks,
            pipeline_dtype=None if stages == 1 else "fp32",
            **megatron,
        )
        dealt = []
        for vp_stage, pp_rank in product(
            [None] if chunks is None else range(chunks), range(stages)
        ):
            count = get_num_layers_to_build(config, vp_stage, pp_rank)
            offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
            dealt.append(list(range(offset, offset + count)))
    except (ValueError, AssertionError, ZeroDivisionError):
        return None
    return dealt


uneven = st.one_of(
    st.fixed_dictionaries({}, optional={FIRST: st.integers(1, 6), LAST: st.integers(1, 6)}),
    st.fixed_dictionaries({}, optional={EMBEDDING: st.just(True), LOSS: st.just(True)}),
)


@given(
    num_layers=st.integers(1, 12),
    stages=st.integers(2, 5),
    chunks=st.sampled_from([None, 2, 3]),
    megatron=uneven,
)
@example(num_layers=6, stages=2, chunks=3, megatron={FIRST: 3, LAST: 3})
def test_a_layout_is_accepted_exactly_where_every_chunk_gets_a_layer_of_megatron(
    num_layers: int, stages: int, chunks: int | None, megatron: dict[str, Any]
) -> None:
    parallel = layout(stages, chunks)
    dealt = megatron_deals_out(parallel, megatron, num_layers)
    works = dealt is not None and all(dealt)
    assert (message_of(parallel, megatron, num_layers) is None) == works
    if dealt is not None and works:
        assert [layer for layers in dealt for layer in layers] == list(range(num_layers))


@given(
    num_layers=st.integers(1, 12),
    stages=st.integers(2, 9),
    chunks=st.sampled_from([None, 2, 3]),
    megatron=uneven,
)
def test_every_layout_that_a_message_offers_is_accepted(
    num_layers: int, stages: int, chunks: int | None, megatron: dict[str, Any]
) -> None:
    message = message_of(layout(stages, chunks), megatron, num_layers)
    if message is None or "would work" not in message:
        return
    for offer in re.split(r", or (?=\D)", message.rpartition("; ")[2].replace(" would work", "")):
        fixed, given_chunks, given = stages, chunks, megatron
        values = [int(value) for value in re.findall(r"\b\d+\b", offer)]
        if "megatron." in offer:
            names = re.findall(r"megatron\.(\w+) = (\d+)", offer)
            given = {name: int(value) for name, value in names}
            assert message_of(layout(fixed, given_chunks), given, num_layers) is None
        elif offer.startswith("no virtual"):
            assert message_of(layout(fixed), given, num_layers) is None
        elif "virtual" in offer:
            for value in values:
                assert message_of(layout(fixed, value), given, num_layers) is None
        else:
            for value in values:
                assert message_of(layout(value, given_chunks), given, num_layers) is None


@pytest.mark.parametrize(
    ("parallel", "megatron", "num_layers", "message"),
    [
        (
            layout(8),
            {},
            4,
            "student.parallel.pipeline_model_parallel_size = 8 must divide the student's layers "
            "(4); 1, 2 or 4 would work",
        ),
        (
            layout(8),
            {},
            36,
            "student.parallel.pipeline_model_parallel_size = 8 must divide the student's layers "
            "(36); 1, 2, 3, 4, 6, 9, 12, 18 or 36 would work, or "
            "student.megatron.num_layers_in_first_pipeline_stage = 3 with "
            "student.megatron.num_layers_in_last_pipeline_stage = 3",
        ),
        (
            layout(2, 4),
            {},
            4,
            "student.parallel.pipeline_model_parallel_size = 2 with "
            "student.parallel.virtual_pipeline_model_parallel_size = 4 can't deal out the "
            "student's layers (4): the 2 of stage 0 don't come out even over 4 chunks; "
            "virtual_pipeline_model_parallel_size = 2 would work, or no "
            "virtual_pipeline_model_parallel_size",
        ),
        (
            layout(2),
            {LOSS: True},
            4,
            "student.parallel.pipeline_model_parallel_size = 2 with student.megatron.account_for_"
            "loss_in_pipeline_split = true can't deal out the student's layers (4): 5 layers and "
            "the loss don't come out even over 2 stages",
        ),
        (
            layout(2),
            {FIRST: 0},
            4,
            "student.parallel.pipeline_model_parallel_size = 2 with student.megatron.num_layers_in_"
            "first_pipeline_stage = 0 can't deal out the student's layers (4): stage 0 would have "
            "a chunk without a layer",
        ),
        (
            layout(2, 3),
            {FIRST: 3, LAST: 3},
            6,
            "student.parallel.pipeline_model_parallel_size = 2 with student.parallel.virtual_"
            "pipeline_model_parallel_size = 3 with student.megatron.num_layers_in_first_pipeline_"
            "stage = 3 with student.megatron.num_layers_in_last_pipeline_stage = 3 can't deal out "
            "the student's layers (6): with chunks, Megatron needs num_layers_in_first_pipeline_"
            "stage or num_layers_in_last_pipeline_stage left out where there are 2 stages; no "
            "virtual_pipeline_model_parallel_size would work, or student.megatron.num_layers_in_"
            "first_pipeline_stage = 3",
        ),
        (
            layout(1),
            {FIRST: 2},
            4,
            "student.megatron.num_layers_in_first_pipeline_stage needs "
            "student.parallel.pipeline_model_parallel_size > 1, not 1",
        ),
        (
            layout(2),
            {FIRST: 2, LOSS: True},
            5,
            "student.megatron.num_layers_in_first_pipeline_stage can't be given together with "
            "student.megatron.account_for_loss_in_pipeline_split",
        ),
    ],
)
def test_a_refusal_names_the_settings_and_what_would_work(
    parallel: ParallelConfig, megatron: dict[str, Any], num_layers: int, message: str
) -> None:
    assert (message_of(parallel, megatron, num_layers) or "").startswith(message)
