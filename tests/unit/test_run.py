"""What is already in output_dir when a run starts, and what the records come to at its end."""

import json
from pathlib import Path

import pytest
from support.run_settings import small_run

from poweropd_megatron.config.load import to_toml
from poweropd_megatron.config.schema import ObjectiveConfig, TrainConfig
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.train.evaluation import Evaluation
from poweropd_megatron.train.recorder import Recorder, summarise
from poweropd_megatron.train.run import check_same_run, finished_summary

PHASES = {f"time/{phase}_seconds": 1.0 for phase in ("rollout", "teacher", "student")}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Return the settings of a run whose config.toml is in its folder."""
    config = small_run(tmp_path, output_dir=str(tmp_path / "run"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text(to_toml(config))
    return config


def publish(config: TrainConfig, step: int) -> None:
    (Path(config.output_dir) / "checkpoints" / f"step_{step:06d}").mkdir()


def test_settings_may_change_until_there_is_something_to_resume_from(config: TrainConfig) -> None:
    config.objective = ObjectiveConfig(alpha=2.0)
    check_same_run(config)
    publish(config, 4)
    with pytest.raises(ConfigError, match=r"objective.alpha: was 5.0, is 2.0"):
        check_same_run(config)


def test_steps_that_are_done_already_are_refused_before_any_other_difference(
    config: TrainConfig,
) -> None:
    publish(config, 8)
    config.train_steps, config.seed = 6, 5
    with pytest.raises(ConfigError, match=r"train_steps = 6, .* has a checkpoint of step 8"):
        check_same_run(config)


@pytest.mark.parametrize("summary", ["", "{", "[1]", "{}", '{"steps": 8}'])
def test_a_run_is_finished_only_with_a_summary_of_all_its_steps(
    config: TrainConfig, summary: str
) -> None:
    folder = Path(config.output_dir)
    publish(config, 10)
    (folder / "export").mkdir()
    (folder / "summary.json").write_text(summary)
    assert finished_summary(config) is None
    (folder / "summary.json").write_text('{"steps": 10}')
    assert finished_summary(config) == {"steps": 10}
    publish(config, 11)
    assert finished_summary(config) is None


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
