"""The answers of an evaluation on rank 0: checked as they come, kept, and summed up."""

from collections.abc import Sequence
from pathlib import Path

import torch

from poweropd_megatron.config.evaluation_schema import EvaluationConfig
from poweropd_megatron.data.answers import AnswerChecker, build_answer_checker
from poweropd_megatron.evaluation.answering import Answer, Series, checked
from poweropd_megatron.evaluation.inputs import EvaluationInputs, model_digest, prompts_digest
from poweropd_megatron.evaluation.records import EvaluationRecords
from poweropd_megatron.evaluation.results import results_of, table_of
from poweropd_megatron.rollout.trajectories import Trajectories


class Keeper:
    """The answers on rank 0, checked as they come and kept in output_dir; elsewhere it is empty."""

    def __init__(
        self, config: EvaluationConfig, inputs: EvaluationInputs, all_series: Sequence[Series]
    ) -> None:
        self.all_series = all_series
        self._config = config
        self._inputs = inputs
        self._answers: list[list[Answer]] = [[] for _ in all_series]
        self._records: EvaluationRecords
        self._checker: AnswerChecker | None = None

    def open(self) -> None:
        """Read the answers that are there. Raises: ConfigError, InputError."""
        prompts = {name: prompts_digest(rows) for name, rows in self._inputs.prompts.items()}
        identity = {
            "model_sha256": model_digest(Path(self._config.student.path)),
            "prompts_sha256": prompts,
        }
        self._records = EvaluationRecords(self._config, identity)
        self._answers = self._records.open(self.all_series)

    def num_done(self) -> torch.Tensor:
        """Return how many answers of each series there are."""
        return torch.tensor([len(answers) for answers in self._answers])

    def start_checker(self) -> None:
        """Start what checks answers. Raises: ConfigError."""
        self._checker = build_answer_checker(self._config.data)

    def stop_checker(self) -> None:
        """End it, where it runs."""
        if self._checker is not None:
            self._checker.close()

    def keep(self, number: int, start: int, trajectories: Trajectories) -> list[Answer]:
        """Return the answers in the next part of a series, after writing them down."""
        assert self._checker is not None
        series = self.all_series[number]
        answers = checked(
            trajectories,
            series,
            start,
            tokenizer=self._inputs.tokenizer,
            checker=self._checker,
        )
        self._records.write(series, start, answers, self._config.seed)
        self._answers[number] += answers
        return answers

    def finish(self) -> list[str]:
        """Write the results, and return them as a table."""
        results = results_of(self.all_series, self._answers, pass_at=self._config.eval.pass_at)
        path = self._records.finish(results)
        return ["", *table_of(results), "", f"results: {path}"]
