"""Greedy accuracy, Avg@k, Pass@k and their standard errors, on scripted answers and by hand."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.made_trajectories import make

from poweropd_megatron.config.schema import EvalConfig
from poweropd_megatron.data.answers import ExactChecker, Verdict
from poweropd_megatron.data.prompts import Prompt
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.evaluation.estimators import mean_and_standard_error
from poweropd_megatron.evaluation.evaluator import Evaluation, Evaluator
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import Trajectories

EOS = 1
RIGHT, WRONG, CUT = "#7", "#13", "1+1"
"""Responses to prompts whose answer is 7; the last one doesn't come to its end."""


class ScriptedEngine:
    """Gives the next script's texts, whatever it is asked."""

    def __init__(self, tokenizer: Tokenizer, scripts: Sequence[Sequence[str]]) -> None:
        self._tokenizer = tokenizer
        self._scripts = iter(scripts)
        self.calls: list[tuple[list[tuple[int, ...]], Sampling, tuple[int, ...], int]] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        stream: tuple[int, ...],
        weight_version: int,
        first_sequence: int = 0,
    ) -> Trajectories:
        assert first_sequence == 0
        self.calls.append((list(map(tuple, prompts)), sampling, stream, weight_version))
        texts = next(self._scripts)
        assert len(texts) == len(prompts)
        responses = [
            self._tokenizer.encode(text) + ([] if text == CUT else [EOS]) for text in texts
        ]
        return make(list(zip(prompts, responses, strict=True)), eos=EOS)


@pytest.fixture(scope="module")
def tokenizer(student_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(student_folder)


class ForgetfulChecker(ExactChecker):
    """Can't judge a response that is cut, as a checker of expressions that runs out of time."""

    def check(self, response: str, answer: str, tolerance: float | None = None) -> Verdict:
        if response == CUT:
            return Verdict(correct=False, failure="deadline")
        return super().check(response, answer, tolerance)


class UnusableChecker(ExactChecker):
    """Is not to be asked."""

    def check(self, response: str, answer: str, tolerance: float | None = None) -> Verdict:
        raise AssertionError(response, answer, tolerance)


def prompt(text: str, source: str, tokenizer: Tokenizer) -> Prompt:
    answer = str(sum(map(int, text.rstrip("=").split("+"))))
    return Prompt(text=text, token_ids=tuple(tokenizer.encode(text)), answer=answer, source=source)


def evaluate(
    tokenizer: Tokenizer,
    scripts: Sequence[Sequence[str]],
    sources: dict[str, list[str]],
    *,
    num_logged_samples: int = 0,
    checker: ExactChecker | None = None,
    is_first_rank: bool = True,
    **settings: Any,
) -> tuple[Evaluation, ScriptedEngine]:
    engine = ScriptedEngine(tokenizer, scripts)
    evaluator = Evaluator(
        EvalConfig(**settings),
        {
            source: [prompt(text, source, tokenizer) for text in texts]
            for source, texts in sources.items()
        },
        engine=engine,
        tokenizer=tokenizer,
        checker=checker or ExactChecker("#"),
        num_logged_samples=num_logged_samples,
        is_first_rank=is_first_rank,
    )
    return evaluator.evaluate(weight_version=12), engine


def test_one_files_metrics_are_those_computed_by_hand(tokenizer: Tokenizer) -> None:
    """Averages of the prompts are 3/4 and 0, with a sample standard deviation of 0.75 / sqrt 2."""
    greedy = [RIGHT, WRONG]
    sampled = [RIGHT, RIGHT, WRONG, RIGHT, CUT, WRONG, CUT, CUT]
    evaluation, _ = evaluate(tokenizer, [greedy, sampled], {"a": ["3+4=", "5+2="]}, num_samples=4)
    assert evaluation.metrics == pytest.approx(
        {
            "eval/greedy_accuracy": 0.5,
            "eval/greedy_accuracy_se": 0.5,
            "eval/avg@4": 0.375,
            "eval/avg@4_se": 0.375,
            "eval/pass@4": 0.5,
            "eval/pass@4_se": 0.5,
            "eval/response_length": (3 * 3 + 2 * 4 + 3 * 3) / 8,
            "eval/eos_rate": 5 / 8,
            "eval/truncation_rate": 3 / 8,
            "eval/answer_failures": 0,
        }
    )


def test_each_answer_is_compared_with_that_of_its_own_prompt(tokenizer: Tokenizer) -> None:
    sources = {"a": ["3+4=", "9+4="]}
    scripts = [["#7", "#13"], ["#7", "#7", "#7", "#13", "#13", "#7"]]
    evaluation, _ = evaluate(tokenizer, scripts, sources, num_samples=3)
    assert evaluation.metrics["eval/greedy_accuracy"] == 1.0
    assert evaluation.metrics["eval/avg@3"] == pytest.approx((1 + 2 / 3) / 2)


def test_samples_of_a_prompt_are_not_counted_as_independent(tokenizer: Tokenizer) -> None:
    """Two prompts, one always right and one always wrong: as uncertain as two answers."""
    sampled = [RIGHT] * 8 + [WRONG] * 8
    evaluation, _ = evaluate(
        tokenizer, [sampled], {"a": ["3+4=", "5+2="]}, num_samples=8, greedy=False
    )
    assert evaluation.metrics["eval/avg@8"] == 0.5
    assert evaluation.metrics["eval/avg@8_se"] == pytest.approx(0.5)
    assert "eval/greedy_accuracy" not in evaluation.metrics


def test_several_files_are_averaged_with_equal_weight_and_reported_each(
    tokenizer: Tokenizer,
) -> None:
    sources = {"a": ["3+4=", "5+2="], "b": ["7=", "6+1=", "0+7=", "1+6="]}
    scripts = [
        [RIGHT, WRONG, WRONG, WRONG],
        [RIGHT, RIGHT, WRONG, RIGHT, RIGHT, WRONG, RIGHT, WRONG],
    ]
    evaluation, _ = evaluate(tokenizer, scripts, sources, num_samples=2, greedy=False)
    metrics = evaluation.metrics
    assert metrics["eval/a/avg@2"] == 0.25
    assert metrics["eval/a/pass@2"] == 0.5
    assert metrics["eval/b/avg@2"] == 0.625
    assert metrics["eval/b/pass@2"] == 1.0
    assert metrics["eval/avg@2"] == (0.25 + 0.625) / 2
    assert metrics["eval/pass@2"] == 0.75
    a_error, b_error = 0.25, 0.25 / 2
    assert metrics["eval/a/avg@2_se"] == pytest.approx(a_error)
    assert metrics["eval/b/avg@2_se"] == pytest.approx(b_error)
    assert metrics["eval/avg@2_se"] == pytest.approx(math.hypot(a_error, b_error) / 2)


def test_answers_that_could_not_be_checked_are_counted_anew_over_all_files(
    tokenizer: Tokenizer,
) -> None:
    sources = {"a": ["3+4=", "5+2="], "b": ["7="]}
    checker = ForgetfulChecker("#")
    scripts = [[CUT, WRONG], [RIGHT, CUT, CUT, RIGHT], [RIGHT], [CUT, CUT]]
    first, _ = evaluate(tokenizer, scripts, sources, checker=checker, num_samples=2)
    assert first.metrics["eval/answer_failures"] == 5
    assert first.metrics["eval/avg@2"] == 0.25
    assert [name for name in first.metrics if "failures" in name] == ["eval/answer_failures"]
    scripts = [[RIGHT, CUT], [RIGHT] * 4, [RIGHT], [RIGHT] * 2]
    second, _ = evaluate(tokenizer, scripts, sources, checker=checker, num_samples=2)
    assert second.metrics["eval/answer_failures"] == 1


def test_only_the_greedy_answer_is_given_where_no_samples_are_asked_for(
    tokenizer: Tokenizer,
) -> None:
    evaluation, engine = evaluate(tokenizer, [[RIGHT, CUT]], {"a": ["7=", "6+1="]}, num_samples=0)
    assert evaluation.metrics == pytest.approx(
        {
            "eval/greedy_accuracy": 0.5,
            "eval/greedy_accuracy_se": 0.5,
            "eval/response_length": 3.0,
            "eval/eos_rate": 0.5,
            "eval/truncation_rate": 0.5,
            "eval/answer_failures": 0,
        }
    )
    assert len(engine.calls) == 1


def test_each_prompt_is_asked_k_times_with_the_settings_and_the_files_own_stream(
    tokenizer: Tokenizer,
) -> None:
    sources = {"a": ["7=", "6+1="], "b": ["5+2="]}
    scripts = [[RIGHT] * 2, [RIGHT] * 6, [RIGHT], [RIGHT] * 3]
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_new_tokens": 9}
    _, engine = evaluate(tokenizer, scripts, sources, num_samples=3, **settings)
    first, second, third = (tuple(tokenizer.encode(text)) for text in ("7=", "6+1=", "5+2="))
    greedy = Sampling(max_new_tokens=9, temperature=0.0, top_p=1.0, top_k=0)
    sampled = Sampling(**settings)
    assert engine.calls == [
        ([first, second], greedy, (1, 0), 12),
        ([first] * 3 + [second] * 3, sampled, (1, 0), 12),
        ([third], greedy, (1, 1), 12),
        ([third] * 3, sampled, (1, 1), 12),
    ]


def test_other_ranks_than_the_first_generate_and_check_nothing(tokenizer: Tokenizer) -> None:
    sources = {"a": ["3+4=", "5+2="]}
    evaluation, engine = evaluate(
        tokenizer,
        [[RIGHT] * 2, [RIGHT] * 4],
        sources,
        checker=UnusableChecker("#"),
        is_first_rank=False,
        num_samples=2,
        num_logged_samples=2,
    )
    assert len(engine.calls) == 2
    assert evaluation == Evaluation(metrics={}, samples=[])


def test_pass_at_smaller_k_is_estimated_from_all_samples(tokenizer: Tokenizer) -> None:
    """Of four samples 1 and 0 are right, so 3 of the 6 pairs of one prompt, none of the other."""
    sampled = [WRONG, RIGHT, CUT, WRONG] + [WRONG] * 4
    sources = {"a": ["3+4=", "5+2="]}
    evaluation, _ = evaluate(
        tokenizer, [sampled], sources, num_samples=4, pass_at=[2, 1], greedy=False
    )
    metrics = evaluation.metrics
    assert metrics["eval/pass@1"] == metrics["eval/avg@4"] == pytest.approx(1 / 8)
    assert metrics["eval/pass@2"] == pytest.approx(1 / 4)
    assert metrics["eval/pass@2_se"] == pytest.approx(1 / 4)
    assert metrics["eval/pass@4"] == pytest.approx(1 / 2)


def test_the_first_answer_to_each_of_the_first_prompts_is_logged(tokenizer: Tokenizer) -> None:
    sources = {"a": ["7=", "6+1=", "5+2="]}
    sampled = [RIGHT, WRONG, CUT, RIGHT, WRONG, RIGHT]
    evaluation, _ = evaluate(
        tokenizer, [sampled], sources, num_samples=2, greedy=False, num_logged_samples=2
    )
    shared = {"source": "a", "answer": "7"}
    assert evaluation.samples == [
        {**shared, "prompt": "7=", "response": RIGHT, "correct": True, "finish": "stop"},
        {**shared, "prompt": "6+1=", "response": CUT, "correct": False, "finish": "length"},
    ]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=40))
def test_the_standard_error_is_the_sample_deviation_over_the_root_of_the_count(
    values: list[float],
) -> None:
    mean, error = mean_and_standard_error(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-12)
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert error == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_value_has_no_standard_error() -> None:
    assert mean_and_standard_error([0.25]) == (0.25, 0.0)
