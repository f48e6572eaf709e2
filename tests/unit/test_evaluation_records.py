"""The folder of an evaluation: samples read back as they were written, and whose it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from poweropd_megatron.config.evaluation_schema import EvaluationConfig
from poweropd_megatron.config.schema import AnsweringConfig, PromptConfig, StudentConfig
from poweropd_megatron.data.answers import Verdict
from poweropd_megatron.data.prompts import Prompt
from poweropd_megatron.errors import ConfigError, InputError
from poweropd_megatron.evaluation.answering import Answer, Series, series_of
from poweropd_megatron.evaluation.inputs import model_digest, prompts_digest
from poweropd_megatron.evaluation.records import EvaluationRecords
from poweropd_megatron.evaluation.results import results_of, table_of

IDENTITY = {"model_sha256": "m", "prompts_sha256": {"a": "1", "b": "2"}}
ANSWERS = [
    Answer(
        response="line\nbreak\u2028 \\boxed{é}",
        num_tokens=9,
        stopped=True,
        verdict=Verdict(correct=True, extracted="é"),
    ),
    Answer(response="", num_tokens=5, stopped=False, verdict=Verdict(correct=False)),
    Answer(
        response="x",
        num_tokens=2,
        stopped=True,
        verdict=Verdict(correct=False, failure="deadline"),
    ),
]


@pytest.fixture
def config(tmp_path: Path) -> EvaluationConfig:
    return EvaluationConfig(
        output_dir=str(tmp_path / "out"),
        student=StudentConfig(path="model"),
        data=PromptConfig(eval_files=["a.jsonl", "b.jsonl"]),
        eval=AnsweringConfig(num_samples=3, greedy=False),
    )


@pytest.fixture
def all_series(config: EvaluationConfig) -> list[Series]:
    """Return three samples of one prompt of a file, and of two of another."""
    prompts = {
        source: [
            Prompt(text=f"{source}{n}", token_ids=(n,), answer="é", source=source, id=f"#{n}")
            for n in range(count)
        ]
        for source, count in (("a", 1), ("b", 2))
    }
    return series_of(config.eval, prompts)


def records(config: EvaluationConfig, **identity: Any) -> EvaluationRecords:
    return EvaluationRecords(config, IDENTITY | identity)


def samples(config: EvaluationConfig) -> Path:
    return Path(config.output_dir) / "samples.jsonl"


@pytest.fixture
def begun(config: EvaluationConfig, all_series: list[Series]) -> EvaluationConfig:
    """Return the settings of an evaluation with the samples of one file and one of the other."""
    begun = records(config)
    assert begun.open(all_series) == [[], []]
    begun.write(all_series[0], 0, ANSWERS, seed=7)
    begun.write(all_series[1], 0, ANSWERS[:1], seed=7)
    return config


def test_answers_are_read_back_as_they_were_written(
    begun: EvaluationConfig, all_series: list[Series]
) -> None:
    assert records(begun).open(all_series) == [ANSWERS, ANSWERS[:1]]
    lines = [json.loads(line) for line in samples(begun).read_text().split("\n")[:-1]]
    assert [line["seed"] for line in lines] == [[7, 1, 0, n] for n in range(3)] + [[7, 1, 1, 0]]
    assert (lines[2]["failure"], lines[0]["id"], lines[1]["finish"]) == ("deadline", "#0", "length")


def test_a_torn_line_is_dropped_and_written_anew(
    begun: EvaluationConfig, all_series: list[Series]
) -> None:
    whole = samples(begun).read_bytes()
    samples(begun).write_bytes(whole + '{"source": "b", "é'.encode()[:-1])
    again = records(begun)
    assert again.open(all_series) == [ANSWERS, ANSWERS[:1]]
    assert samples(begun).read_bytes() == whole
    again.write(all_series[1], 1, ANSWERS[1:], seed=7)
    assert records(begun).open(all_series) == [ANSWERS, ANSWERS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0], *lines[2:]], ":2 is no sample of this evaluation"),
        (lambda lines: [*lines[:2], b"{}", lines[3]], ":3 is no sample of this evaluation"),
        (lambda lines: [*lines[:3], b"[1]"], ":4 is no sample of this evaluation"),
        (lambda lines: [b"no JSON", *lines[1:]], ":1 is no sample of this evaluation"),
        (lambda lines: lines + lines * 2, ":5 is no sample"),
    ],
    ids=["left out", "without fields", "no object", "no JSON", "twice"],
)
def test_lines_that_are_no_samples_are_named(
    begun: EvaluationConfig, all_series: list[Series], change: Any, message: str
) -> None:
    lines = change(samples(begun).read_bytes().split(b"\n")[:-1])
    samples(begun).write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(InputError, match=r"delete this and all later lines") as caught:
        records(begun).open(all_series)
    assert message in str(caught.value)


def test_more_samples_than_the_evaluation_has_are_refused(
    begun: EvaluationConfig, all_series: list[Series]
) -> None:
    with pytest.raises(InputError, match=r":4: this evaluation has 3 samples"):
        records(begun).open(all_series[:1])


def test_layout_batches_path_and_k_may_change(
    begun: EvaluationConfig, all_series: list[Series]
) -> None:
    begun.student.path = "elsewhere"
    begun.student.parallel.tensor_model_parallel_size = 4
    begun.rollout.micro_batch_size = begun.save_interval = 3
    begun.eval.pass_at = [2]
    assert records(begun).open(all_series) == [ANSWERS, ANSWERS[:1]]
    assert 'path = "elsewhere"' in (Path(begun.output_dir) / "config.toml").read_text()


def other_seed(config: EvaluationConfig) -> None:
    config.seed = 5


def other_check(config: EvaluationConfig) -> None:
    config.data.answer_check = "math"


@pytest.mark.parametrize(
    ("change", "identity", "message"),
    [
        (other_seed, {}, "with other settings: seed: was 1234, is 5"),
        (other_check, {}, "with other settings: data.answer_check: was 'exact', is 'math'"),
        (None, {"model_sha256": "n"}, "of another model: the files in student.path = model"),
        (None, {"prompts_sha256": {"a": "1", "b": "3"}}, "of other prompts: b has changed since"),
    ],
)
def test_an_evaluation_of_something_else_is_refused_and_left_alone(
    begun: EvaluationConfig,
    all_series: list[Series],
    change: Any,
    identity: dict[str, Any],
    message: str,
) -> None:
    before = {path.name: path.read_bytes() for path in Path(begun.output_dir).iterdir()}
    if change:
        change(begun)
    with pytest.raises(ConfigError) as caught:
        records(begun, **identity).open(all_series)
    assert message in str(caught.value)
    assert "choose another output_dir, or remove that folder" in str(caught.value)
    assert {p.name: p.read_bytes() for p in Path(begun.output_dir).iterdir()} == before


def test_a_folder_of_something_else_is_refused(
    config: EvaluationConfig, all_series: list[Series]
) -> None:
    (Path(config.output_dir) / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has checkpoints, but no identity\.json"):
        records(config).open(all_series)


@pytest.mark.parametrize("text", ["", "{}", '{"model_sha256": "m", "prompts_sha256": 3}'])
def test_a_folder_that_does_not_say_whose_it_is_is_refused(
    begun: EvaluationConfig, all_series: list[Series], text: str
) -> None:
    (Path(begun.output_dir) / "identity.json").write_text(text)
    with pytest.raises(ConfigError, match="doesn't say which evaluation it holds"):
        records(begun).open(all_series)


def test_a_models_digest_is_of_what_its_files_hold(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "weights").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "weights" / ".metadata").write_bytes(b"1")
    before = model_digest(model)
    (model / ".cache").mkdir()
    (model / ".cache" / "x").write_text("x")
    assert model_digest(model) == before
    assert model_digest(model.rename(tmp_path / "moved")) == before
    model = tmp_path / "moved"
    (model / "weights" / ".metadata").write_bytes(b"2")
    changed = model_digest(model)
    (model / "config.json").rename(model / "other.json")
    assert len({before, changed, model_digest(model)}) == 3


def test_prompts_digest_is_of_what_is_asked_and_what_is_right() -> None:
    prompt = {"text": "1+1", "token_ids": (1, 2), "answer": "2", "source": "a"}
    changes = [{}, {"text": "1+2"}, {"token_ids": (1, 3)}, {"answer": "3"}, {"tolerance": 0.1}]
    digests = {prompts_digest([Prompt(**(prompt | change))]) for change in changes}
    assert len(digests) == len(changes)
    assert prompts_digest([Prompt(**(prompt | {"source": "b"}))]) in digests


def test_the_table_has_a_column_a_file_their_mean_and_what_was_not_judged(
    all_series: list[Series],
) -> None:
    results = results_of(all_series, [ANSWERS, ANSWERS + ANSWERS[:1] * 3], pass_at=[1])
    assert results["files"]["b"]["measures"]["avg@3"] == pytest.approx(2 / 3)
    assert results["mean"]["avg@3"] == pytest.approx(0.5)
    assert results["files"]["a"]["answer_failures"] == {"deadline": 1}
    lines = table_of(results)
    cells = {line[:20].strip(): line[20:].split("  ") for line in lines}
    assert lines[0].split() == ["a", "b", "mean"]
    assert [cell.strip() for cell in cells["avg@3"] if cell] == [
        "33.3 % ± 0.0",
        "66.7 % ± 33.3",
        "50.0 % ± 16.7",
    ]
    assert [cell.strip() for cell in cells["prompts"] if cell.strip()] == ["1", "2"]
    assert "not judged, and counted as wrong, in b: 1 x deadline" in lines
