"""Megatron's settings: tables of the files, and entries of them on the command line."""

from pathlib import Path

import pytest

from poweropd_megatron.config.load import parse_train_config
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.errors import ConfigError

RUN = """
output_dir = "runs/x"
train_steps = 5
global_batch_size = 4
student = {path = "student", megatron = {bucket_size = 9, recompute_granularity = "full"}}
teacher.path = "teacher"
data.train_files = ["a.jsonl"]
"""


def parse(folder: Path, *overrides: str) -> TrainConfig:
    (folder / "run.toml").write_text(RUN)
    return parse_train_config(["--config", str(folder / "run.toml"), *overrides])


def test_entries_of_the_command_line_change_the_files_table(tmp_path: Path) -> None:
    config = parse(
        tmp_path,
        *("--student.megatron.recompute_granularity=selective", "--student.megatron.bucket_size"),
        *("null", "--student.megatron.overlap_grad_reduce", "true", "--seed=7"),
        '--student.megatron.recompute_modules=["mlp"]',
        "--teacher.megatron.num_layers_in_first_pipeline_stage=3",
    )
    assert config.student.megatron == {
        "recompute_granularity": "selective",
        "overlap_grad_reduce": True,
        "recompute_modules": ["mlp"],
    }
    assert config.teacher.megatron == {"num_layers_in_first_pipeline_stage": 3}
    assert config.seed == 7


def test_a_table_of_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    config = parse(tmp_path, "--student.megatron={bucket_size = 3}")
    assert config.student.megatron == {"bucket_size": 3}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--student.megatron.bucket_size"], "--student.megatron.bucket_size needs a value"),
        (["--student.megatron.a", "--seed=3"], "--student.megatron.a needs a value"),
        (["--student.megatron.a.b=1"], "student.megatron.a.b is not a setting"),
    ],
)
def test_an_entry_needs_a_value_and_no_deeper_name(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(tmp_path, *overrides)
