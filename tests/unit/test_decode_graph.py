"""Replayed decoding steps give what plain ones give while rows end and prompts join, on tapes.

Shapes: B sequences, S prompt positions, V vocabulary, Hk heads, D channels of a head.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.taped_graphs import TapedGraph, use_taped_graphs
from torch import Tensor

from poweropd_megatron.models import kv_cache
from poweropd_megatron.models.kv_cache import KVCache
from poweropd_megatron.rollout import decode_step
from poweropd_megatron.rollout.decode_step import DecodeStep

V, HEADS, D, NUM_STEPS = 17, 2, 4, 14
PROMPT_LENGTHS = (3, 1, 5, 2, 4, 5)
KEPT_BEFORE_STEP = {4: [0, 1, 2, 4], 9: [1, 3]}
JOINS_BEFORE_STEP = {2: (3, 2), 6: (1, 13), 11: (1, 40), 12: (1, 1)}
"""The row, and the length of the prompt that takes it."""
GONE_BEFORE_STEP = {11: 1}
"""The row that is free again at once: its prompt has moved the cache, and that is all."""
VISIBLE_MULTIPLE = 4


class Attention:
    """One layer of attention over a cache: from tokens [B, 1] to logits [B, V]."""

    def __init__(self) -> None:
        self._generator = generator = torch.Generator().manual_seed(0)
        self.embedding_VC = torch.randn(V, 3 * HEADS * D, generator=generator)
        self.position_SC = torch.randn(64, 3 * HEADS * D, generator=generator)
        self.output_CV = torch.randn(HEADS * D, V, generator=generator)
        self.cache = KVCache(1, len(PROMPT_LENGTHS), torch.device("cpu"))
        self.join(range(len(PROMPT_LENGTHS)), PROMPT_LENGTHS)

    def join(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Fill rows with prompts of these lengths."""
        self.cache.admit(rows, lengths)
        shape = (2, len(rows), HEADS, max(lengths), D)
        self.cache.layers[0].extend(*torch.randn(shape, generator=self._generator))

    def __call__(self, token_ids_B1: Tensor) -> Tensor:
        mixed_B1C = self.embedding_VC[token_ids_B1]
        mixed_B1C = mixed_B1C + self.position_SC[self.cache.positions_B][:, None]
        query, key, value = mixed_B1C.unflatten(2, (3, HEADS, D)).permute(2, 0, 3, 1, 4)
        keys, values, mask = self.cache.layers[0].extend(key, value)
        scores = (query @ keys.mT).masked_fill(~mask, -torch.inf)
        found_BC = (scores.softmax(3) @ values)[:, :, 0].flatten(1)
        return found_BC @ self.output_CV


Step = Callable[..., Any]


def decode(make_step: Step, *, with_graph: bool, with_joins: bool = True) -> list[Tensor]:
    """Return the logits of each step, each of the likeliest tokens of the one before."""
    attention = Attention()
    step = make_step(attention, attention.cache, with_graph=with_graph)
    tokens_B = torch.arange(len(PROMPT_LENGTHS))
    logits = []
    for number in range(NUM_STEPS):
        if number in KEPT_BEFORE_STEP:
            rows = KEPT_BEFORE_STEP[number]
            attention.cache.keep_rows(rows)
            tokens_B = tokens_B[rows]
        if with_joins and number in JOINS_BEFORE_STEP:
            row, length = JOINS_BEFORE_STEP[number]
            attention.cache.release([row])
            attention.join([row], [length])
        if with_joins and number in GONE_BEFORE_STEP:
            attention.cache.release([GONE_BEFORE_STEP[number]])
        logits.append(step(tokens_B).clone())
        tokens_B = logits[-1].argmax(1)
    return logits


@pytest.fixture(autouse=True)
def _tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take tapes for graphs, and a cache whose view grows several times."""
    monkeypatch.setattr(kv_cache, "VISIBLE_MULTIPLE", VISIBLE_MULTIPLE)
    use_taped_graphs(monkeypatch)


def assert_alike(actual: list[Tensor], expected: list[Tensor]) -> None:
    for number, (step, expected_step) in enumerate(zip(actual, expected, strict=True)):
        assert step.isfinite().all()
        torch.testing.assert_close(
            step, expected_step, msg=lambda text, n=number: f"step {n}: {text}"
        )


def test_replayed_steps_give_the_logits_of_plain_ones() -> None:
    plain, replayed = (decode(DecodeStep, with_graph=flag) for flag in (False, True))
    assert_alike(replayed, plain)
    assert len({tuple(logits.argmax(1).tolist()) for logits in plain}) > NUM_STEPS // 2


def test_a_graph_is_recorded_for_each_number_of_rows_and_each_view_of_the_cache() -> None:
    decode(DecodeStep, with_graph=True, with_joins=False)
    rows, longest, shapes = len(PROMPT_LENGTHS), max(PROMPT_LENGTHS), set()
    for number in range(NUM_STEPS):
        rows = len(KEPT_BEFORE_STEP.get(number, range(rows)))
        if number == 9:
            longest -= 1  # The longest prompts are among the rows that end.
        longest += 1
        shapes.add((rows, -(-longest // VISIBLE_MULTIPLE)))
    assert TapedGraph.num_recorded == len(shapes) > 4
    assert TapedGraph.num_replayed == NUM_STEPS


BUGS = {
    "the cache's growth is missed": (
        "self._recorded != self._cache.shape",
        "(self._recorded or (0,))[0] != len(tokens_B)",
    ),
    "the rows that ended are missed": (
        "self._recorded != self._cache.shape",
        "(self._recorded or (0, 0))[1:] != self._cache.shape[1:]",
    ),
    "a prompt that moved the cache and is gone is missed": (
        "self._recorded != self._cache.shape",
        "(self._recorded or (0, 0))[:2] != self._cache.shape[:2]",
    ),
    "the tokens aren't copied": ("self._token_ids_B1.copy_(tokens_B[:, None])", "pass"),
    "the graph isn't replayed": ("self._graph.replay()", "pass"),
    "the cache doesn't advance": (
        "self._cache.advance()",
        "self._with_graph or self._cache.advance()",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_in_the_step_are_noticed(bug: str) -> None:
    text, replacement = BUGS[bug]
    source = inspect.getsource(DecodeStep)
    assert source.count(text) == 1
    names = dict(vars(decode_step))
    exec(source.replace(text, replacement), names)
    plain = decode(DecodeStep, with_graph=False)
    with pytest.raises((AssertionError, RuntimeError, IndexError, TypeError)):
        assert_alike(decode(names["DecodeStep"], with_graph=True), plain)


def test_a_step_that_waits_for_the_gpu_can_not_be_recorded() -> None:
    def make_waiting_step(attention: Attention, cache: KVCache, **settings: Any) -> DecodeStep:
        def forward(token_ids_B1: Tensor) -> Tensor:
            return attention(token_ids_B1) * float(token_ids_B1.max() >= 0)

        return DecodeStep(forward, cache, **settings)

    decode(make_waiting_step, with_graph=False)
    with pytest.raises(RuntimeError, match="waits for the GPU while a graph is recorded"):
        decode(make_waiting_step, with_graph=True)
