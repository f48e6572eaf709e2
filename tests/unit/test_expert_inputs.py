"""Models with experts among what a run reads before it starts."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support import qwen3_folder
from support.run_settings import small_run

from poweropd_megatron.config.schema import DataConfig, TrainConfig
from poweropd_megatron.errors import ConfigError, InputError
from poweropd_megatron.train.inputs import read_inputs


@pytest.fixture
def config(tmp_path: Path, student_folder: Path, teacher_folder: Path) -> TrainConfig:
    """Return settings that work, on copies of the bundled models."""
    shutil.copytree(student_folder, tmp_path / "student")
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "1+2+3="}))
    config = small_run(
        tmp_path / "student",
        tmp_path / "teacher",
        data=DataConfig(train_files=[str(tmp_path / "train.jsonl")]),
        output_dir=str(tmp_path / "runs" / "new"),
    )
    config.rollout.max_new_tokens = 64
    return config


def put_experts(folder: str, num_experts: int = 4) -> None:
    """Make a Qwen3-MoE of a model, for the bundled tokenizer."""
    changes = qwen3_folder.MOE | {"num_experts": num_experts}
    qwen3_folder.write(Path(folder), vocab_size=24, **changes)


def refused(config: TrainConfig, kind: type[Exception], *parts: str, world_size: int = 1) -> None:
    """Assert that the inputs are refused with a message that has these parts, in order."""
    with pytest.raises(kind, match="(?s)" + ".*".join(map(re.escape, parts))):
        read_inputs(config, world_size=world_size)


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_model_with_experts_is_accepted_and_refused_where_ranks_cannot_share_them(
    config: TrainConfig, model: str
) -> None:
    parallel = getattr(config, model).parallel
    parallel.expert_model_parallel_size = 2
    refused(config, ConfigError, f"{model}.path is a dense model: set it to 1", world_size=2)
    for path in (config.student.path, config.teacher.path):
        put_experts(path)
    inputs = read_inputs(config, world_size=2)
    assert getattr(inputs, model).experts.num_moe_experts == 4
    refused(config, ConfigError, "must divide the ranks of a pipeline stage (3)", world_size=3)
    parallel.expert_model_parallel_size = 8
    config.global_batch_size = 16
    refused(
        config,
        ConfigError,
        f"{model}.parallel.expert_model_parallel_size = 8",
        "experts (4); 1, 2 or 4 would work",
        world_size=8,
    )
    put_experts(getattr(config, model).path, num_experts=6)
    refused(config, ConfigError, "experts (6); 1 or 2 would work", world_size=8)
    parallel.expert_model_parallel_size = 1
    parallel.tensor_model_parallel_size = 2
    refused(config, ConfigError, f"needs {model}.parallel.sequence_parallel = true", world_size=2)


def test_a_config_that_describes_other_experts_than_the_weights_is_refused(
    config: TrainConfig,
) -> None:
    put_experts(config.teacher.path)
    file = Path(config.teacher.path, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts": 6}))
    refused(
        config, InputError, "teacher.path", "2 layers of 6 experts", "lacks model.layers.0.mlp.exp"
    )
