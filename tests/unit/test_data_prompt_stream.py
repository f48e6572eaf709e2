"""The endless stream of prompts: its epochs and its resumption."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poweropd_megatron.data.prompts import Prompt, PromptStream
from poweropd_megatron.errors import CheckpointError, InputError


def numbered(count: int) -> list[Prompt]:
    return [
        Prompt(text=str(index), token_ids=(index,), answer=None, source="a")
        for index in range(count)
    ]


def draw(stream: PromptStream, *sizes: int) -> list[str]:
    return [prompt.text for size in sizes for prompt in stream.next_batch(size)]


@given(
    count=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 30), max_size=6),
    seed=st.integers(0, 2**32),
    shuffle=st.booleans(),
)
def test_every_epoch_has_every_prompt_once_however_it_is_cut_into_batches(
    count: int, sizes: list[int], seed: int, shuffle: bool
) -> None:
    stream = PromptStream(numbered(count), seed=seed, shuffle=shuffle)
    drawn = draw(stream, *sizes)
    assert drawn == draw(PromptStream(stream.prompts, seed=seed, shuffle=shuffle), sum(sizes))
    for start in range(0, len(drawn), count):
        epoch = drawn[start : start + count]
        assert max(Counter(epoch).values()) == 1
    assert stream.state_dict() == {
        "epoch": sum(sizes) // count,
        "index": sum(sizes) % count,
        "num_prompts": count,
    }


@given(
    count=st.integers(1, 12),
    before=st.integers(0, 40),
    after=st.integers(1, 40),
    shuffle=st.booleans(),
)
def test_resumed_stream_goes_on_as_if_it_had_never_stopped(
    count: int, before: int, after: int, shuffle: bool
) -> None:
    stream = PromptStream(numbered(count), seed=7, shuffle=shuffle)
    draw(stream, before)
    resumed = PromptStream(numbered(count), seed=7, shuffle=shuffle)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert draw(resumed, after) == draw(stream, after)


def test_orders_differ_between_epochs_and_seeds_and_ignore_the_global_generator() -> None:
    prompts = numbered(50)
    random.seed(0)
    drawn = draw(PromptStream(prompts, seed=1, shuffle=True), 150)
    random.seed(1)
    assert drawn == draw(PromptStream(prompts, seed=1, shuffle=True), 150)
    epochs = [drawn[:50], drawn[50:100], drawn[100:]]
    other_seed = draw(PromptStream(prompts, seed=2, shuffle=True), 50)
    file_order = [prompt.text for prompt in prompts]
    assert len({tuple(order) for order in [*epochs, other_seed, file_order]}) == 5
    assert draw(PromptStream(prompts, seed=1, shuffle=False), 100) == file_order * 2


def test_order_of_a_seed_is_fixed_for_ever() -> None:
    stream = PromptStream(numbered(8), seed=1234, shuffle=True)
    assert "".join(draw(stream, 16)) == "2506413724103576"


def test_position_of_other_data_is_refused() -> None:
    state = PromptStream(numbered(5), seed=1, shuffle=True).state_dict()
    with pytest.raises(
        CheckpointError, match=r"5 training prompts, but data\.train_files now has 6"
    ):
        PromptStream(numbered(6), seed=1, shuffle=True).load_state_dict(state)


def test_stream_without_prompts_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.train_files names no file"):
        PromptStream([], seed=1, shuffle=True)
