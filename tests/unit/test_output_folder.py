"""What is in output_dir before a run: runs go on, results stay, other files are left alone."""

from pathlib import Path

import pytest
from support.run_settings import small_run

from poweropd_megatron.config.load import to_toml
from poweropd_megatron.config.schema import ObjectiveConfig, OptimizerConfig, TrainConfig
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.train.output_folder import check_place, check_same_run, finished_summary


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Return the settings of a run whose config.toml is in its folder."""
    config = small_run(tmp_path, output_dir=str(tmp_path / "run"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text(to_toml(config))
    return config


def folder_of(config: TrainConfig) -> Path:
    return Path(config.output_dir)


def publish(config: TrainConfig, step: int) -> None:
    (folder_of(config) / "checkpoints" / f"step_{step:06d}").mkdir()


def finish(config: TrainConfig) -> None:
    """Leave what a finished run leaves, but for its checkpoints."""
    (folder_of(config) / "export").mkdir()
    for name, text in (("summary.json", '{"steps": 10}'), ("metrics.jsonl", '{"step": 0}\n')):
        (folder_of(config) / name).write_text(text)


def change_alpha(config: TrainConfig) -> None:
    config.objective = ObjectiveConfig(alpha=2.0)


def test_settings_may_change_until_there_is_something_to_resume_from(config: TrainConfig) -> None:
    (folder_of(config) / "metrics.jsonl").write_text('{"step": 0}\n')
    change_alpha(config)
    check_same_run(config)
    publish(config, 4)
    with pytest.raises(ConfigError, match=r"objective.alpha: was 5.0, is 2.0"):
        check_same_run(config)


def test_results_outlive_their_checkpoints(config: TrainConfig) -> None:
    finish(config)
    check_same_run(config)
    assert finished_summary(config) == {"steps": 10}
    change_alpha(config)
    words = r"holds the results of a run with other settings: objective.alpha: was 5.0, is 2.0\. "
    with pytest.raises(ConfigError, match=words + "Choose another output_dir, or remove it$"):
        check_same_run(config)


@pytest.mark.parametrize("kept", ["export", "summary.json"])
def test_results_that_cannot_be_gone_on_with_are_not_replaced_by_a_new_start(
    config: TrainConfig, kept: str
) -> None:
    finish(config)
    config.train_steps = 12
    with pytest.raises(ConfigError, match=r"summary.json, export\), but no checkpoint to go on"):
        check_same_run(config)
    config.train_steps = 10
    if kept == "export":
        (folder_of(config) / "summary.json").unlink()
    else:
        (folder_of(config) / "export").rmdir()
    with pytest.raises(ConfigError, match=rf"results of a run \({kept}\), but no checkpoint"):
        check_same_run(config)


@pytest.mark.parametrize("name", ["checkpoints", "export", "metrics.jsonl", "summary.json"])
def test_what_has_no_settings_beside_it_is_nobodys_to_replace(
    config: TrainConfig, name: str
) -> None:
    finish(config)
    publish(config, 10)
    settings = folder_of(config) / "config.toml"
    settings.unlink()
    with pytest.raises(ConfigError, match=rf"has .*{name}.*, but no config.toml") as caught:
        check_same_run(config)
    assert f"restore {settings}" in str(caught.value)


def test_settings_of_something_else_are_not_replaced(config: TrainConfig) -> None:
    path = folder_of(config) / "config.toml"
    path.write_text("[server]\nport = 80\n")
    with pytest.raises(ConfigError, match=rf"output_dir: {path} is not the settings of a run \("):
        check_same_run(config)


def test_an_export_beside_settings_that_made_no_record_is_the_users(config: TrainConfig) -> None:
    (folder_of(config) / "export").mkdir()
    with pytest.raises(ConfigError, match=r"export is not a run's: .* neither checkpoints nor rec"):
        check_same_run(config)


@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize("below", ["", "/epoch1"])
def test_a_model_is_not_read_from_where_the_export_goes(
    config: TrainConfig, name: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_place(config)
    config.output_dir = "run"
    (tmp_path / "link").symlink_to(tmp_path / "run")
    getattr(config, name).path = f"link/export{below}"
    with pytest.raises(ConfigError, match=rf"^{name}.path: link/export.* export will be written"):
        check_place(config)


def test_steps_that_are_done_already_are_refused_before_any_other_difference(
    config: TrainConfig,
) -> None:
    publish(config, 8)
    config.train_steps, config.seed = 6, 5
    with pytest.raises(ConfigError, match=r"train_steps = 6, .* has a checkpoint of step 8"):
        check_same_run(config)


@pytest.mark.parametrize("style", ["constant", "cosine"])
def test_a_decay_that_longer_training_would_stretch_comes_with_the_way_to_keep_it(
    config: TrainConfig, style: str
) -> None:
    config.optimizer = OptimizerConfig(lr_decay_style=style)
    (folder_of(config) / "config.toml").write_text(to_toml(config))
    publish(config, 10)
    config.train_steps = 12
    if style == "constant":
        check_same_run(config)
        return
    with pytest.raises(ConfigError, match=r"--optimizer.lr_decay_iters 10 keeps that run's sched"):
        check_same_run(config)
    config.optimizer.lr_decay_iters = 10
    check_same_run(config)
    config.optimizer.lr_decay_iters = 12
    with pytest.raises(ConfigError, match="lr_decay_iters: was 10, is 12") as caught:
        check_same_run(config)
    assert "keeps" not in str(caught.value)


@pytest.mark.parametrize("summary", ["", "{", "[1]", "{}", '{"steps": 8}'])
def test_a_run_is_finished_only_with_a_summary_of_all_its_steps(
    config: TrainConfig, summary: str
) -> None:
    publish(config, 10)
    finish(config)
    (folder_of(config) / "summary.json").write_text(summary)
    assert finished_summary(config) is None
    (folder_of(config) / "summary.json").write_text('{"steps": 10}')
    assert finished_summary(config) == {"steps": 10}
    publish(config, 11)
    assert finished_summary(config) is None
