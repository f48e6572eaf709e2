"""How good the student is: greedy accuracy, Avg@k and Pass@k, with standard errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poweropd_megatron.config.schema import EvalConfig
from poweropd_megatron.data.answers import AnswerChecker
from poweropd_megatron.data.prompts import Prompt
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.rollout.engine import RolloutEngine
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import FINISH_STOP, Trajectories

EVAL_STREAM = 1
"""First number of the random streams of evaluations; the same numbers at every evaluation of a run.
"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics under their eval/ names, and the first responses of each file."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Graded:
    """Responses to the prompts of one file, one list of k a prompt."""

    correct: list[list[bool]]
    lengths: list[int]
    stopped: list[bool]


class Evaluator:
    """Generates and checks answers to the prompts of each evaluation file."""

    def __init__(
        self,
        config: EvalConfig,
        prompts_by_source: Mapping[str, Sequence[Prompt]],
        *,
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        checker: AnswerChecker,
        num_logged_samples: int,
    ) -> None:
        self._config = config
        self._prompts_by_source = prompts_by_source
        self._engine = engine
        self._tokenizer = tokenizer
        self._checker = checker
        self._num_logged_samples = num_logged_samples

    def evaluate(self, *, weight_version: int) -> Evaluation:
        """Return the evaluation of the current weights. Called by all ranks.

        With several files each metric is the mean over the files (as the papers average
        benchmarks), and each file's own stands under eval/<stem>/. eval/answer_failures counts
        the answers, of all files, that are taken for wrong because they couldn't be checked.
        """
        failures_before = self._checker.num_failures
        by_source: dict[str, dict[str, float]] = {}
        samples: list[dict[str, Any]] = []
        for number, (source, prompts) in enumerate(self._prompts_by_source.items()):
            by_source[source] = {}
            if self._config.greedy:
                graded, rows = self._answer(prompts, 1, number, weight_version, greedy=True)
                by_source[source] |= _greedy_metrics(graded)
                samples += rows
            if self._config.num_samples:
                graded, rows = self._answer(
                    prompts, self._config.num_samples, number, weight_version, greedy=False
                )
                by_source[source] |= _sampled_metrics(graded, self._config.num_samples)
                samples += [] if self._config.greedy else rows
            by_source[source] |= _shape_metrics(graded)
        metrics = {f"eval/{name}": value for name, value in _mean_over_sources(by_source).items()}
        if by_source:
            failures = self._checker.num_failures - failures_before
            metrics["eval/answer_failures"] = float(failures)
        if len(by_source) > 1:
            for source, values in by_source.items():
                metrics |= {f"eval/{source}/{name}": value for name, value in values.items()}
        return Evaluation(metrics=metrics, samples=samples)

    def _answer(
        self,
        prompts: Sequence[Prompt],
        k: int,
        number: int,
        weight_version: int,
        *,
        greedy: bool,
    ) -> tuple[_Graded, list[dict[str, Any]]]:
        config = self._config
        trajectories = self._engine.generate(
            [prompt.token_ids for prompt in prompts for _ in range(k)],
            Sampling(
                max_new_tokens=config.max_new_tokens,
                temperature=0.0 if greedy else config.temperature,
                top_p=1.0 if greedy else config.top_p,
                top_k=0 if greedy else config.top_k,
            ),
            stream=(EVAL_STREAM, number),
            weight_version=weight_version,
        )
        responses = [
            self._tokenizer.decode(trajectories.response_ids(i))
            for i in range(trajectories.num_sequences)
        ]
        flat = [
            self._checker.check(responses[i], prompts[i // k].answer or "")
            for i in range(len(responses))
        ]
        correct = [flat[i : i + k] for i in range(0, len(flat), k)]
        logged = range(0, min(len(prompts), self._num_logged_samples) * k, k)
        rows = [
            _sample_row(prompts[i // k], responses[i], flat[i], trajectories, i) for i in logged
        ]
        graded = _Graded(
            correct=correct,
            lengths=trajectories.response_lengths_B.tolist(),
            stopped=(trajectories.finish_B == FINISH_STOP).tolist(),
        )
        return graded, rows


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and its standard error over independent values (0 for fewer than two)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _greedy_metrics(graded: _Graded) -> dict[str, float]:
    mean, error = mean_and_standard_error([float(answers[0]) for answers in graded.correct])
    return {"greedy_accuracy": mean, "greedy_accuracy_se": error}


def _sampled_metrics(graded: _Graded, k: int) -> dict[str, float]:
    """Standard errors are over prompts: the k answers of a prompt are not independent."""
    average, average_error = mean_and_standard_error([sum(x) / k for x in graded.correct])
    passed, passed_error = mean_and_standard_error([float(any(x)) for x in graded.correct])
    return {
        f"avg@{k}": average,
        f"avg@{k}_se": average_error,
        f"pass@{k}": passed,
        f"pass@{k}_se": passed_error,
    }


def _shape_metrics(graded: _Graded) -> dict[str, float]:
    eos_rate = sum(graded.stopped) / len(graded.stopped)
    return {
        "response_length": sum(graded.lengths) / len(graded.lengths),
        "eos_rate": eos_rate,
        "truncation_rate": 1 - eos_rate,
    }


def _mean_over_sources(by_source: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return each metric's mean over files, and the standard error of that mean."""
    tables = list(by_source.values())
    count = len(tables)
    return {
        name: math.sqrt(sum(table[name] ** 2 for table in tables)) / count
        if name.endswith("_se")
        else sum(table[name] for table in tables) / count
        for name in (tables[0] if tables else {})
    }


def _sample_row(
    prompt: Prompt, response: str, correct: bool, trajectories: Trajectories, row: int
) -> dict[str, Any]:
    return {
        "source": prompt.source,
        "prompt": prompt.text,
        "response": response,
        "answer": prompt.answer,
        "correct": correct,
        "finish": "stop" if trajectories.finish_B[row] == FINISH_STOP else "length",
    }
