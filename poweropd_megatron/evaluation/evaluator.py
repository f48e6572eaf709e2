"""How good the student is as it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from poweropd_megatron.config.schema import EvalConfig
from poweropd_megatron.data.answers import AnswerChecker
from poweropd_megatron.data.prompts import Prompt
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.evaluation.answering import Answer, Series, checked, generate, series_of
from poweropd_megatron.evaluation.measures import Answered, mean_over_files, measures_of
from poweropd_megatron.rollout.engine import RolloutEngine


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics under their eval/ names, and the first responses of each file."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


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
        is_first_rank: bool,
    ) -> None:
        self._series = series_of(config, prompts_by_source)
        self._pass_at = config.pass_at
        self._engine = engine
        self._tokenizer = tokenizer
        self._checker = checker
        self._num_logged_samples = num_logged_samples
        self._is_first_rank = is_first_rank

    def evaluate(self, *, weight_version: int) -> Evaluation:
        """Return the evaluation of the current weights. Called by all ranks; empty but on rank 0.

        With several files each metric is the mean over the files (as the papers average
        benchmarks), and each file's own stands under eval/<stem>/. eval/answer_failures counts
        the answers, of all files, that are taken for wrong because they couldn't be checked.
        """
        answered = [(series, self._answer(series, weight_version)) for series in self._series]
        if not self._is_first_rank:
            return Evaluation(metrics={}, samples=[])
        by_source: dict[str, dict[str, float]] = {}
        samples: list[dict[str, Any]] = []
        for source, group in groupby(answered, key=lambda pair: pair[0].source):
            of_source: Answered = list(group)
            by_source[source] = measures_of(of_source, pass_at=self._pass_at)
            samples += self._first_rows(*of_source[0])
        metrics = {f"eval/{name}": value for name, value in mean_over_files(by_source).items()}
        if by_source:
            failed = [a.verdict.failure is not None for _, answers in answered for a in answers]
            metrics["eval/answer_failures"] = float(sum(failed))
        if len(by_source) > 1:
            for source, values in by_source.items():
                metrics |= {f"eval/{source}/{name}": value for name, value in values.items()}
        return Evaluation(metrics=metrics, samples=samples)

    def _answer(self, series: Series, weight_version: int) -> list[Answer]:
        trajectories = generate(
            self._engine, series, 0, series.num_responses, weight_version=weight_version
        )
        if not self._is_first_rank:
            return []
        return checked(trajectories, series, 0, tokenizer=self._tokenizer, checker=self._checker)

    def _first_rows(self, series: Series, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return the first answer to each of the first prompts."""
        firsts = zip(series.prompts, answers[:: series.num_samples], strict=True)
        return [
            {
                "source": prompt.source,
                "prompt": prompt.text,
                "response": answer.response,
                "answer": prompt.answer,
                "correct": answer.verdict.correct,
                "finish": "stop" if answer.stopped else "length",
            }
            for prompt, answer in list(firsts)[: self._num_logged_samples]
        ]
