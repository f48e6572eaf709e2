"""Megatron's settings, and how stages share layers, as a run reads them before it starts."""

from pathlib import Path

import pytest
from support.run_inputs import refused, working_config

from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.train.inputs import read_inputs


@pytest.fixture
def config(tmp_path: Path, student_folder: Path, teacher_folder: Path) -> TrainConfig:
    """Return settings that work, on copies of the bundled models."""
    return working_config(tmp_path, student_folder, teacher_folder)


def test_a_megatron_setting_is_refused_before_a_model_is_looked_at(config: TrainConfig) -> None:
    config.student.megatron = {"recompute_granularty": "full"}
    config.student.path = "nowhere"
    refused(config, ConfigError, "student.megatron.recompute_granularty", "recompute_granularity")


def test_switches_of_transformer_engines_are_compared_with_the_backend_that_is_asked_for(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "0")
    refused(config, ConfigError, "NVTE_FLASH_ATTN = 0", "attention_backend = 'auto' makes it 1")
    config.teacher.num_ranks = 1
    config.student.megatron = {"attention_backend": "local"}
    refused(config, ConfigError, "attention_backend = 'auto' makes it 1", world_size=2)
    config.teacher.megatron = {"attention_backend": "local"}
    read_inputs(config, world_size=2)


def test_layers_that_do_not_come_out_even_over_chunks_are_refused(config: TrainConfig) -> None:
    config.student.parallel.pipeline_model_parallel_size = 2
    config.student.parallel.virtual_pipeline_model_parallel_size = 3
    refused(
        config,
        ConfigError,
        "pipeline_model_parallel_size = 2 with student.parallel.virtual_pipeline_model_parallel_",
        "virtual_pipeline_model_parallel_size = 2 would work",
        world_size=2,
    )


def test_stages_of_the_teacher_may_be_uneven(config: TrainConfig) -> None:
    config.teacher.parallel.pipeline_model_parallel_size = 2
    config.teacher.megatron = {"num_layers_in_last_pipeline_stage": 1}
    assert read_inputs(config, world_size=2).teacher.num_layers == 4
