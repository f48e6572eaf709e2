"""The folder of an evaluation: whose it is, its samples as they come, and its results.

config.toml     every setting, ready for --config
identity.json   digests of the model's files and of each file's prompts
samples.jsonl   a line a response, in order
results.json    the measures of each file and their mean, once all responses are there
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poweropd_megatron.config.evaluation import CHANGEABLE_IN_EVALUATION
from poweropd_megatron.config.evaluation_schema import EvaluationConfig
from poweropd_megatron.config.load import read_toml, to_toml
from poweropd_megatron.config.rules import frozen_differences
from poweropd_megatron.config.settings import EVALUATION
from poweropd_megatron.data.answers import Verdict
from poweropd_megatron.errors import ConfigError, InputError
from poweropd_megatron.evaluation.answering import Answer, Series
from poweropd_megatron.telemetry.sinks import replace_text, write_json_atomically

CONFIG_NAME, IDENTITY_NAME = "config.toml", "identity.json"
SAMPLES_NAME, RESULTS_NAME = "samples.jsonl", "results.json"


class EvaluationRecords:
    """What an evaluation keeps in output_dir, on rank 0."""

    def __init__(self, config: EvaluationConfig, identity: Mapping[str, Any]) -> None:
        self.folder = Path(config.output_dir)
        self._config = config
        self._identity = identity
        self._samples = self.folder / SAMPLES_NAME

    def open(self, all_series: Sequence[Series]) -> list[list[Answer]]:
        """Return the answers that are there already, of each series, and make ready for more.

        Raises: ConfigError if the folder has files of something else, or of an evaluation of
        another model, of other prompts or with other settings; InputError for lines that are no
        samples of it.
        """
        self._check_same()
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / CONFIG_NAME, to_toml(self._config))
        write_json_atomically(self.folder / IDENTITY_NAME, self._identity)
        return self._read(all_series)

    def write(self, series: Series, start: int, answers: Sequence[Answer], seed: int) -> None:
        """Append the answers from number `start` of a series on; they survive a kill from here."""
        lines = [
            json.dumps(_record(series, start + row, answer, seed), ensure_ascii=False) + "\n"
            for row, answer in enumerate(answers)
        ]
        with self._samples.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, results: Mapping[str, Any]) -> Path:
        """Write results.json, and return where."""
        path = self.folder / RESULTS_NAME
        settings = dataclasses.asdict(self._config)
        write_json_atomically(path, {**results, **self._identity, "settings": settings})
        return path

    def _check_same(self) -> None:
        config_path, identity_path = self.folder / CONFIG_NAME, self.folder / IDENTITY_NAME
        if not identity_path.exists():
            found = [
                n
                for n in (CONFIG_NAME, SAMPLES_NAME, RESULTS_NAME, "checkpoints")
                if (self.folder / n).exists()
            ]
            if found:
                raise ConfigError(
                    f"output_dir: {self.folder} has {', '.join(found)}, but no {IDENTITY_NAME} "
                    "that tells of which evaluation: choose another output_dir, or move what is "
                    "there"
                )
            return
        another = "choose another output_dir, or remove that folder to evaluate anew"
        try:
            identity = json.loads(identity_path.read_text("utf-8"))
            model, prompts = identity["model_sha256"], dict(identity["prompts_sha256"])
            before = read_toml(config_path, EVALUATION)
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise ConfigError(
                f"output_dir: {self.folder} doesn't say which evaluation it holds ({error}): "
                f"{another}"
            ) from None
        differences = frozen_differences(
            before,
            dataclasses.asdict(self._config),
            schema=EVALUATION,
            changeable=CHANGEABLE_IN_EVALUATION,
        )
        if differences:
            raise ConfigError(
                f"{self.folder} holds an evaluation with other settings: "
                f"{'; '.join(differences)}. Set them back, or {another}"
            )
        if model != self._identity["model_sha256"]:
            raise ConfigError(
                f"{self.folder} holds an evaluation of another model: the files in student.path = "
                f"{self._config.student.path} are not those it began with: {another}"
            )
        for source, digest in self._identity["prompts_sha256"].items():
            if prompts.get(source) != digest:
                raise ConfigError(
                    f"{self.folder} holds an evaluation of other prompts: {source} has changed "
                    f"since: {another}"
                )

    def _read(self, all_series: Sequence[Series]) -> list[list[Answer]]:
        """Return the answers of samples.jsonl; the end of a torn line is dropped from the file."""
        by_series: list[list[Answer]] = [[] for _ in all_series]
        if not self._samples.exists():
            return by_series
        whole, newline, torn = self._samples.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self._samples, len(whole) + len(newline))
        places = [(at, n) for at, s in enumerate(all_series) for n in range(s.num_responses)]
        lines = whole.split(b"\n") if whole else []
        for number, line in enumerate(lines, start=1):
            place = f"{self._samples}:{number}"
            if number > len(places):
                raise InputError(f"{place}: this evaluation has {len(places)} samples; {_REMEDY}")
            at, row = places[number - 1]
            by_series[at].append(_answer(line, all_series[at], row, place))
        return by_series


_REMEDY = "delete this and all later lines to answer them again"


def _place_of(series: Series, number: int) -> dict[str, Any]:
    """Return what tells a response from all others of the evaluation."""
    return {
        "source": series.source,
        "prompt_number": number // series.num_samples,
        "sample": None if series.is_greedy else number % series.num_samples,
    }


def _record(series: Series, number: int, answer: Answer, seed: int) -> dict[str, Any]:
    prompt, verdict = series.prompt_of(number), answer.verdict
    return {
        **_place_of(series, number),
        "id": prompt.id,
        "prompt": prompt.text,
        "response": answer.response,
        "num_tokens": answer.num_tokens,
        "finish": "stop" if answer.stopped else "length",
        "answer": prompt.answer,
        "extracted": verdict.extracted,
        "correct": verdict.correct,
        "failure": verdict.failure,
        "seed": None if series.is_greedy else [seed, *series.stream, number],
    }


def _answer(line: bytes, series: Series, number: int, place: str) -> Answer:
    try:
        record = json.loads(line)
        expected = _place_of(series, number)
        if {name: record[name] for name in expected} != expected:
            raise ValueError(f"expected the sample {expected}")
        return Answer(
            response=str(record["response"]),
            num_tokens=int(record["num_tokens"]),
            stopped={"stop": True, "length": False}[record["finish"]],
            verdict=Verdict(
                correct=bool(record["correct"]),
                extracted=record["extracted"],
                failure=record["failure"],
            ),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{place} is no sample of this evaluation ({error}); {_REMEDY}") from None
