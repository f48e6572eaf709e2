"""Megatron's settings by name: known, of the right type, ours to give, and with an effect."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from support.run_settings import small_run

from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.models.build import transformer_config
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.megatron_settings import (
    STUDENT,
    TEACHER,
    check_generating_settings,
    check_megatron_settings,
    fields_of,
)

CLASSES = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def config_with(*, teacher: bool = False, **megatron: Any) -> TrainConfig:
    config = small_run(Path("student"))
    (config.teacher if teacher else config.student).megatron = megatron
    return config


def message_of(config: TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_megatron_settings(config)
    return str(caught.value)


def test_what_is_accepted_is_in_megatrons_dataclasses() -> None:
    names = {field.name for cls in CLASSES for field in dataclasses.fields(cls)}
    assert set(STUDENT) <= names
    assert set(TEACHER) <= {field.name for field in dataclasses.fields(TransformerConfig)}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tensor_model_parallel_size", "student.parallel.tensor_model_parallel_size sets it"),
        ("virtual_pipeline_model_parallel_size", "student.parallel.virtual_pipeline_model_"),
        ("expert_model_parallel_size", "student.parallel.expert_model_parallel_size sets it"),
        ("expert_tensor_parallel_size", "it is always 1: an expert is whole on its rank"),
        ("moe_router_topk", "config.json in student.path says it"),
        ("sequence_parallel", "student.parallel.sequence_parallel sets it"),
        ("context_parallel_size", "student.parallel.context_parallel_size sets it"),
        ("pipeline_dtype", "student.dtype sets it"),
        ("bf16", "student.dtype sets it"),
        ("lr", "optimizer.lr sets it"),
        ("adam_beta2", "optimizer.adam_beta2 sets it"),
        ("use_distributed_optimizer", "optimizer.use_distributed_optimizer sets it"),
        ("hidden_size", "config.json in student.path says it"),
        ("pipeline_model_parallel_layout", "num_layers_in_first_pipeline_stage"),
        ("hidden_dropout", "it is 0"),
        ("calculate_per_token_loss", "it is always true"),
        ("grad_reduce_in_fp32", "it is always true"),
        ("optimizer", "it is always 'adam'"),
        ("num_buckets", "student.megatron.bucket_size is its way"),
        ("bias_activation_fusion", "it is always false: activations are computed as"),
        ("gradient_accumulation_fusion", "it is always false: it needs CUDA kernels"),
        ("cross_entropy_loss_fusion", "objective.head says how log-probs are computed"),
        ("batch_p2p_comm", "a virtual pipeline sets it"),
        ("overlap_p2p_comm_warmup_flush", "each micro-batch has its own length"),
        ("align_param_gather", "overlap_param_gather sets it"),
        ("tp_comm_overlap", "each micro-batch has its own length"),
        ("fp8_recipe", "Transformer Engine's layers only"),
        ("optimizer_cpu_offload", "checkpoints of an optimizer on the CPU"),
        ("use_torch_optimizer_for_cpu_offload", "checkpoints of an optimizer on the CPU"),
        ("exp_avg_dtype", "Adam's moments are always fp32"),
        ("exp_avg_sq_dtype", "Adam's moments are always fp32"),
        ("finalize_model_grads_func", "it has no effect on these models, changes what they"),
        ("window_size", "it has no effect on these models, changes what they compute"),
    ],
)
def test_what_is_set_elsewhere_or_has_no_use_is_refused_with_the_reason(
    name: str, reason: str
) -> None:
    message = message_of(config_with(**{name: 1}))
    assert message.startswith(f"student.megatron.{name} can't be given: ")
    assert reason in message


def test_every_other_field_of_megatrons_is_refused() -> None:
    for cls in CLASSES:
        for field in dataclasses.fields(cls):
            if field.name not in STUDENT:
                assert "can't be given" in message_of(config_with(**{field.name: 1}))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("recompute_granularty", "recompute_granularity"),
        ("overlap_grad_reduction", "overlap_grad_reduce"),
        ("num_layers_in_first_stage", "num_layers_in_first_pipeline_stage"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    message = message_of(config_with(**{name: True}))
    assert message.startswith(f"student.megatron.{name}: Megatron's configurations have no {name}")
    assert f"the nearest are {nearest}" in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("recompute_granularity", "some", "one of 'full', 'selective' or null"),
        ("recompute_num_layers", "1", "an integer or null"),
        ("recompute_num_layers", True, "an integer or null"),
        ("recompute_modules", "mlp", "a list of strings"),
        ("recompute_modules", ["mlp", 1], "a list of strings"),
        ("overlap_grad_reduce", 1, "true or false"),
        ("bucket_size", 1.5, "an integer or null"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, expected: str) -> None:
    message = message_of(config_with(**{name: value}))
    assert message.startswith(f"student.megatron.{name} must be {expected}")
    assert message.endswith(f", not {value!r}")


@pytest.mark.parametrize(
    ("megatron", "words"),
    [
        ({"recompute_modules": ["mlp"]}, "no effect without student.megatron.recompute_gran"),
        (
            {"deallocate_pipeline_outputs": True},
            "no effect without student.parallel.pipeline_model_parallel_size > 1",
        ),
        ({"bucket_size": 5}, "no effect without student.megatron.overlap_grad_reduce"),
        ({"overlap_param_gather": True}, "no effect without student.megatron.overlap_grad_reduce"),
        ({"overlap_grad_reduce": True, "bucket_size": 0}, "bucket_size must be at least 1, not 0"),
        ({"recompute_granularity": "full"}, "needs student.megatron.recompute_method, such as"),
        (FULL | {"recompute_num_layers": 0}, "recompute_num_layers must be at least 1, not 0"),
        (FULL | {"recompute_modules": ["mlp"]}, "recompute_modules has no effect with student."),
        (
            {"recompute_granularity": "selective", "recompute_method": "block"},
            "recompute_method has no effect with student.megatron.recompute_granularity = 'sel",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
            "recompute_modules has 'moe_act'; 'core_attn', 'mlp' or 'moe' can be",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": []},
            "recompute_modules = [] must name at least one module, and each once",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["mlp", "mlp"]},
            "must name at least one module, and each once",
        ),
        (
            FULL | {"distribute_saved_activations": True},
            "distribute_saved_activations needs student.parallel.tensor_model_parallel_size > 1",
        ),
        (
            {"microbatch_group_size_per_vp_stage": 4},
            "no effect without student.parallel.virtual_pipeline_model_parallel_size",
        ),
    ],
)
def test_what_would_have_no_effect_or_fail_later_is_refused(
    megatron: dict[str, Any], words: str
) -> None:
    assert words in message_of(config_with(**megatron))


@pytest.mark.parametrize("name", ["overlap_param_gather", "pad_buckets_for_high_nccl_busbw"])
def test_what_the_distributed_optimizer_alone_does_needs_it(name: str) -> None:
    config = config_with(overlap_grad_reduce=True, **{name: True})
    check_megatron_settings(config)
    config.optimizer.use_distributed_optimizer = False
    assert f"{name} needs optimizer.use_distributed_optimizer = true" in message_of(config)


def test_groups_of_micro_batches_must_fill_the_stages() -> None:
    config = config_with(microbatch_group_size_per_vp_stage=3)
    config.student.parallel.pipeline_model_parallel_size = 4
    config.student.parallel.virtual_pipeline_model_parallel_size = 2
    assert message_of(config) == (
        "student.megatron.microbatch_group_size_per_vp_stage = 3 must be at least "
        "student.parallel.pipeline_model_parallel_size = 4"
    )


def test_the_teacher_takes_what_deals_out_its_layers_and_how_it_attends() -> None:
    check_megatron_settings(config_with(teacher=True, num_layers_in_first_pipeline_stage=1))
    message = message_of(config_with(teacher=True, **FULL))
    assert message == (
        "teacher.megatron.recompute_granularity can't be given: it is for training, and the "
        "teacher only scores"
    )
    assert "teacher.dtype sets it" in message_of(config_with(teacher=True, bf16=True))
    assert "teacher.megatron.cp_comm_type = 'p2p' has no effect" in message_of(
        config_with(teacher=True, cp_comm_type="p2p")
    )


def test_a_model_that_only_generates_takes_only_what_deals_out_its_layers() -> None:
    check_generating_settings({"num_layers_in_first_pipeline_stage": 1})
    for name, value in {"attention_backend": "local", "cp_comm_type": "p2p", **FULL}.items():
        with pytest.raises(ConfigError) as caught:
            check_generating_settings({name: value})
        assert str(caught.value) == (
            f"student.megatron.{name} can't be given: it is for training, and the student only "
            "generates here"
        )


def test_a_field_of_two_dataclasses_gets_into_both(student_folder: Path) -> None:
    given = {"overlap_param_gather": True, "overlap_grad_reduce": True, **FULL}
    both = {"overlap_param_gather": True}
    assert fields_of(OptimizerConfig, given) == both
    assert fields_of(DistributedDataParallelConfig, given) == both | {"overlap_grad_reduce": True}
    model = read_model_config(student_folder, setting="student.path")
    built = transformer_config(model, small_run(student_folder).student.parallel, "fp32", given)
    assert {name: getattr(built, name) for name in FULL} == FULL
