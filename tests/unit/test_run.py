"""What the records of a run come to at its end."""

import json
import signal
from pathlib import Path

import pytest
from support.run_settings import small_run

from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.evaluation.evaluator import Evaluation
from poweropd_megatron.interruption import Interrupted
from poweropd_megatron.train.batching import Batching
from poweropd_megatron.train.recorder import Recorder, summarise

PHASES = {f"time/{phase}_seconds": 1.0 for phase in ("rollout", "teacher", "student")}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Return the settings of a run whose folder is there."""
    (tmp_path / "run").mkdir()
    return small_run(tmp_path, output_dir=str(tmp_path / "run"))


def test_an_evaluation_after_the_fact_joins_the_line_of_its_step(config: TrainConfig) -> None:
    recorder = Recorder(config, is_first_rank=True)
    samples = [{"prompt": "1+1=", "response": "2"}]
    before = Evaluation(metrics={"eval/greedy_accuracy": 0.25}, samples=samples)
    after = Evaluation(metrics={"eval/greedy_accuracy": 0.75}, samples=samples)
    with recorder.speaking():
        recorder.step(0, {}, diagnostics=None, evaluation=before)
        for step in (1, 2):
            recorder.step(step, {"grad_norm": 1.0, **PHASES}, diagnostics=None, evaluation=None)
        recorder.add_evaluation(2, after)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[2]["grad_norm"] == 1.0
    summary = summarise(records, config, Path("export"))
    assert summary["before"]["greedy_accuracy"] == 0.25
    assert summary["after"]["greedy_accuracy"] == 0.75
    assert summary["train_seconds"] == 6.0


def test_trackers_get_each_metric_of_a_step_once_and_are_closed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.given: list[tuple[int, dict[str, float]]] = []
            self.closed_after: float | None = None

        def write(self, step: int, metrics: dict[str, float]) -> None:
            self.given.append((step, metrics))

        def close(self, *, seconds: float) -> None:
            self.closed_after = seconds

    tracker, asked = Tracker(), []
    monkeypatch.setattr(
        "poweropd_megatron.train.recorder.start_trackers",
        lambda *_, step, **__: asked.append(step) or [tracker],
    )
    found = Evaluation(metrics={"eval/greedy_accuracy": 0.75}, samples=[])
    recorder = Recorder(config, is_first_rank=True)
    with recorder.speaking():
        recorder.start(0)
        recorder.step(0, {}, diagnostics=None, evaluation=found)
        recorder.step(1, {"grad_norm": 1.0, **PHASES}, diagnostics=None, evaluation=None)
        recorder.add_evaluation(1, found)
    assert asked == [0]
    assert tracker.given == [
        (0, found.metrics),
        (1, {"grad_norm": 1.0, **PHASES}),
        (1, found.metrics),
    ]
    assert tracker.closed_after == 60
    with pytest.raises(Interrupted), recorder.speaking():
        raise Interrupted(signal.SIGTERM)
    assert tracker.closed_after == 5


@pytest.mark.parametrize("evaluated", [True, False])
def test_records_that_the_user_deleted_leave_a_finished_run_without_their_numbers(
    config: TrainConfig, evaluated: bool
) -> None:
    recorder = Recorder(config, is_first_rank=True)
    with recorder.speaking():
        recorder.start(10)
        if evaluated:
            found = Evaluation(metrics={"eval/greedy_accuracy": 0.75}, samples=[])
            recorder.add_evaluation(10, found)
        recorder.finish(Path("export"))
    summary = json.loads((Path(config.output_dir) / "summary.json").read_text())
    assert summary["steps"] == 10
    assert summary["after"] == ({"greedy_accuracy": 0.75} if evaluated else {})
    assert summary["grad_norm"] == {}
    assert (Path(config.output_dir) / "report.html").is_file()


def test_sequences_beyond_the_token_budget_are_told_of_when_there_are_longer_ones(
    config: TrainConfig,
) -> None:
    batchings = {
        model: Batching(
            micro_batch_size=1, max_tokens_per_microbatch=budget, dp_size=1, length_multiple=1
        )
        for model, budget in (("student", 100), ("teacher", 400), ("other", None))
    }
    recorder = Recorder(config, is_first_rank=True)
    with recorder.speaking():
        for step, lengths in enumerate(([100, 30], [101, 300], [300, 20], [500, 10]), start=1):
            recorder.tell_of_oversized(step, batchings, lengths)
    said = (Path(config.output_dir) / "train.log").read_text()
    assert said.count("exceed") == 3
    assert (
        "step 2: 2 of 2 sequences, the longest of 300 tokens with padding, exceed "
        "max_tokens_per_microbatch = 100: the student takes each by itself, with that much more "
        "memory"
    ) in said
    assert (
        "step 4: 1 of 2 sequences, the longest of 500 tokens with padding, exceed max_tokens"
        in said
    )
    assert "exceed teacher.max_tokens_per_microbatch = 400: the teacher takes each" in said
