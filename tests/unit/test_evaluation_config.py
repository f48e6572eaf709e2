"""The settings of `poweropd eval`: those of training where both have them, and what is refused."""

import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from poweropd_megatron.config.evaluation import check_evaluation
from poweropd_megatron.config.load import parse_evaluation_config, parse_train_config, read_toml
from poweropd_megatron.config.settings import EVALUATION, SETTINGS
from poweropd_megatron.data.benchmarks import FORMATS
from poweropd_megatron.errors import ConfigError

GIVEN = ["--output_dir=out", "--student.path=model", '--data.eval_files=["a.jsonl"]']
OF_ITS_OWN = {"save_interval", "logits_dtype"}


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_evaluation_config([*GIVEN, *arguments])
    return str(caught.value)


def test_settings_have_the_names_types_and_defaults_of_training() -> None:
    assert EVALUATION.settings.keys() - SETTINGS.keys() == OF_ITS_OWN
    for name in EVALUATION.settings.keys() & SETTINGS.keys():
        ours, theirs = EVALUATION.settings[name], SETTINGS[name]
        assert (ours.type, ours.default) == (theirs.type, theirs.default)
        if name not in ("seed", "output_dir", "distributed_timeout_minutes"):
            assert ours.help == theirs.help


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for setting in EVALUATION.settings.values():
        assert setting.help.endswith((".", ")")), setting.name
    with pytest.raises(SystemExit) as ended:
        parse_evaluation_config(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "poweropd eval --config" in shown
    assert all(f"--{name}" in shown for name in EVALUATION.settings)
    assert "optimizer" not in shown


def test_printed_settings_read_as_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--eval.pass_at=[1, 4]", "--data.eval_formats={a = 'amc'}", "--save_interval=9"]
    with pytest.raises(SystemExit):
        parse_evaluation_config([*GIVEN, *changes, "--print_config"])
    text = capsys.readouterr().out
    assert tomllib.loads(text)["eval"]["pass_at"] == [1, 4]
    (tmp_path / "c.toml").write_text(text)
    again = parse_evaluation_config(["--config", str(tmp_path / "c.toml")])
    assert asdict(again) == asdict(parse_evaluation_config([*GIVEN, *changes]))
    assert read_toml(tmp_path / "c.toml", EVALUATION)["data.eval_formats"] == {"a": "amc"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_steps=5"], "train_steps is a setting of poweropd train, and has no effect here"),
        (["--optimizer.lr=1"], "optimizer.lr is a setting of poweropd train"),
        (["--teacher.megatron.x=1"], "teacher.megatron.x is not a setting"),
        (["--eval.intervall=5"], "eval.intervall is not a setting; did you mean"),
        (["--nothing=5"], "nothing is not a setting; see poweropd eval --help"),
        (["--data.eval_files=[]"], "data.eval_files is empty: name at least one file"),
        (["--save_interval=0"], "save_interval must be at least 1, not 0"),
        (["--eval.num_samples=-1"], "eval.num_samples must be at least 0, not -1"),
        (["--eval.num_samples=0", "--eval.greedy=false"], "leaves no answer to evaluate"),
        (["--eval.pass_at=[9]"], "eval.pass_at has 9, but Pass@k can be estimated for k from 1"),
        (["--eval.pass_at=[0]"], "to eval.num_samples = 8: remove it, or raise eval.num_samples"),
        (["--eval.pass_at=[2, 2]"], "eval.pass_at has 2 2 times: give it once"),
        (["--eval.pass_at=2"], "eval.pass_at must be a list of integers such as [1, 2], not '2'"),
        (["--data.answer_marker="], "data.answer_marker must not be empty"),
        (["--logits_dtype=bf16", "--student.dtype=fp32"], "logits_dtype = 'bf16' needs student"),
        (["--student.parallel.sequence_parallel=true"], "sequence_parallel = true needs"),
        (
            ["--student.parallel.virtual_pipeline_model_parallel_size=2"],
            "virtual_pipeline_model_parallel_size = 2 needs",
        ),
    ],
)
def test_what_can_not_work_is_refused(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_a_layout_that_does_not_fit_the_ranks_is_refused() -> None:
    config = parse_evaluation_config([*GIVEN, "--student.parallel.tensor_model_parallel_size=2"])
    check_evaluation(config, world_size=4)
    with pytest.raises(ConfigError, match=r"must divide the number of ranks \(3\): start 2 or 4"):
        check_evaluation(config, world_size=3)
    config.student.parallel.tensor_model_parallel_size = 1
    config.student.parallel.expert_model_parallel_size = 3
    with pytest.raises(ConfigError, match="expert_model_parallel_size = 3"):
        check_evaluation(config, world_size=4)


def test_the_paper_s_benchmarks_are_evaluated_as_its_training_does() -> None:
    recipes = Path(__file__).parents[2] / "launch" / "recipes"
    training = parse_train_config(["--config", str(recipes / "qwen3_1p7b_from_4b.toml")])
    config = parse_evaluation_config(["--config", str(recipes / "qwen3_1p7b_eval.toml")])
    check_evaluation(config, world_size=8)
    stems = {Path(file).stem for file in config.data.eval_files}
    assert config.data.eval_formats.keys() == stems
    assert set(config.data.eval_formats.values()) == FORMATS.keys()
    settings, of_training = asdict(config.data), asdict(training.data)
    assert settings == {name: of_training[name] for name in settings}
    answering, of_run = asdict(config.eval), asdict(training.eval)
    del answering["pass_at"]
    assert answering == {name: of_run[name] for name in answering}
    bundled = parse_evaluation_config(["--config", str(recipes / "chain_sum_eval.toml")])
    check_evaluation(bundled, world_size=2)


def test_training_refuses_k_beyond_its_samples_too() -> None:
    recipe = str(Path(__file__).parents[2] / "launch" / "recipes" / "chain_sum.toml")
    assert parse_train_config(["--config", recipe, "--eval.pass_at=[2]"]).eval.pass_at == [2]
    with pytest.raises(ConfigError, match=r"eval\.pass_at has 5"):
        parse_train_config(["--config", recipe, "--eval.pass_at=[5]"])
