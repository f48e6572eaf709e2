"""Megatron's own settings, given by name: which of them a run may set, and the checks of both.

What is let through is known to have an effect here and to leave the results as they are, up to
rounding. A field that isn't listed is refused, so that nothing is ignored.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from enum import EnumType
from fnmatch import fnmatchcase
from typing import Any, Literal, get_type_hints

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from poweropd_megatron.config.choices import listed
from poweropd_megatron.config.experts import RECOMPUTED_MODULES
from poweropd_megatron.config.pipeline import UNEVEN
from poweropd_megatron.config.schema import ParallelConfig, TrainConfig
from poweropd_megatron.config.settings import conforms, describe
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.models.attention_settings import check_attention_settings

RECOMPUTE = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "distribute_saved_activations",
)
"""Forget activations in the forward and compute them again in the backward."""

ATTENTION = ("attention_backend", "cp_comm_type")
"""Which kernels attend, and how ranks exchange the keys and values of a sequence."""

STUDENT = (
    *UNEVEN,
    *ATTENTION,
    *RECOMPUTE,
    "microbatch_group_size_per_vp_stage",
    "deallocate_pipeline_outputs",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "bucket_size",
    "pad_buckets_for_high_nccl_busbw",
)
TEACHER = (*UNEVEN, *ATTENTION)
GENERATING = UNEVEN
"""Of a model that only generates, with a cache that no core attention but torch's reads."""

_REFUSED = (
    (
        (
            *("tensor_model_parallel_size", "*pipeline_model_parallel_size"),
            *("expert_model_parallel_size", "context_parallel_size", "sequence_parallel"),
        ),
        "{model}.parallel.{field} sets it",
    ),
    (("expert_tensor_parallel_size",), "it is always 1: an expert is whole on its rank"),
    (("params_dtype", "pipeline_dtype", "bf16", "fp16"), "{model}.dtype sets it"),
    (
        ("lr", "min_lr", "weight_decay", "adam_*", "clip_grad", "use_distributed_optimizer"),
        "optimizer.{field} sets it",
    ),
    (
        (
            *("num_layers", "*hidden_size", "num_attention_heads", "num_query_groups"),
            *("kv_channels", "layernorm_epsilon", "normalization", "qk_layernorm"),
            *("gated_linear_unit", "activation_func", "add_*_bias", "add_bias_linear"),
        ),
        "config.json in {model}.path says it",
    ),
    (
        ("pipeline_model_parallel_layout",),
        "the layers of a stage are set with " + ", ".join(UNEVEN),
    ),
    (("moe_*", "num_moe_experts"), "config.json in {model}.path says it, or it is fixed"),
    (("*_dropout",), "it is 0, so that training sees the model that generated"),
    (
        (
            *("optimizer_cpu_offload", "optimizer_offload_fraction", "overlap_cpu_optimizer_*"),
            *("pin_cpu_*", "use_torch_optimizer_for_cpu_offload"),
        ),
        "checkpoints of an optimizer on the CPU beside the GPU's were not tried",
    ),
    (
        (
            *("use_precision_aware_optimizer", "main_*_dtype", "exp_avg_*dtype"),
            "store_param_remainders",
        ),
        "main weights, their gradients and Adam's moments are always fp32",
    ),
    (("calculate_per_token_loss",), "it is always true: the loss is a mean over all tokens"),
    (("variable_seq_lengths",), "it is always true: each micro-batch has its own length"),
    (("grad_reduce_in_fp32",), "it is always true"),
    (("optimizer",), "it is always 'adam'"),
    (("overlap_p2p_comm", "batch_p2p_comm"), "a virtual pipeline sets it"),
    (
        ("cross_entropy_loss_fusion",),
        "there is no cross entropy: objective.head says how log-probs are computed",
    ),
    (
        ("gradient_accumulation_fusion",),
        "it is always false: it needs CUDA kernels of Apex's or Transformer Engine's",
    ),
    (("*_fusion",), "it is always false: activations are computed as transformers does"),
    (("num_buckets",), "megatron.core doesn't look at it; {model}.megatron.bucket_size is its way"),
    (("align_param_gather",), "overlap_param_gather sets it"),
    (("average_in_collective",), "the loss is a mean over all tokens, which rules it out"),
    (
        ("overlap_p2p_comm_warmup_flush",),
        "a stage would wait for the next micro-batch's length before it computes one: here each "
        "micro-batch has its own length",
    ),
    (
        ("tp_comm_*",),
        "it works in Transformer Engine's layers only, whose buffers have one size for all "
        "micro-batches: here each micro-batch has its own length",
    ),
    (
        ("fp8*", "fp4*", "delay_wgrad_compute", "cpu_offloading*", "use_te_*"),
        "it works in Transformer Engine's layers only, and these models have Megatron's local ones",
    ),
)
"""Fields by pattern, with why they can't be given."""

_NEEDS = {
    **dict.fromkeys(RECOMPUTE[1:], "recompute_granularity"),
    "bucket_size": "overlap_grad_reduce",
    "overlap_param_gather": "overlap_grad_reduce",
}
"""Settings that Megatron ignores without another one."""


def fields_of(cls: type, megatron: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings that are fields of one of Megatron's dataclasses."""
    types = get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls) if field.name in megatron]
    return {name: _value_of(megatron[name], types[name]) for name in fields}


def _value_of(given: Any, kind: Any) -> Any:
    """Return a setting as Megatron has it, a member of an enumeration by its name."""
    return kind[given] if isinstance(kind, EnumType) else given


def check_megatron_settings(config: TrainConfig) -> None:
    """Return if the settings given by name are known, of the right type, and have an effect.

    Needs no process group, and comes out alike on every rank.
    Raises: ConfigError that names the setting, and what to use instead.
    """
    _check_names("student", config.student.megatron, STUDENT)
    _check_names("teacher", config.teacher.megatron, TEACHER)
    check_attention_settings(config)
    _check_effects(config)


def check_generating_settings(megatron: Mapping[str, Any]) -> None:
    """Return if the settings given by name have an effect on a student that only generates.

    Raises: ConfigError that names the setting, and what to use instead.
    """
    _check_names("student", megatron, GENERATING)


def _check_names(
    model: Literal["student", "teacher"], megatron: Mapping[str, Any], accepted: Sequence[str]
) -> None:
    classes = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
    types = {name: kind for cls in classes for name, kind in get_type_hints(cls).items()}
    for name, value in megatron.items():
        setting = f"{model}.megatron.{name}"
        if name not in types:
            nearest = difflib.get_close_matches(name, [*accepted, *types], n=3) or accepted
            raise ConfigError(
                f"{setting}: Megatron's configurations have no {name}; the nearest are "
                f"{', '.join(nearest)}"
            )
        if name not in accepted:
            raise ConfigError(f"{setting} can't be given: {_reason(model, name, accepted)}")
        if not conforms(value, types[name]):
            raise ConfigError(f"{setting} must be {describe(types[name])}, not {value!r}")


def _reason(model: str, name: str, accepted: Sequence[str]) -> str:
    for patterns, reason in _REFUSED:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return reason.format(model=model, field=name)
    if name in STUDENT:
        does = "only scores" if model == "teacher" else "only generates here"
        return f"it is for training, and the {model} {does}"
    return (
        "it has no effect on these models, changes what they compute, or was not tried with them; "
        f"{', '.join(accepted)} can be given"
    )


def _check_effects(config: TrainConfig) -> None:
    """Refuse what Megatron would ignore, and what it would refuse later."""
    given, parallel = config.student.megatron, config.student.parallel
    for name, needed in _NEEDS.items():
        if given.get(name) and not given.get(needed):
            raise ConfigError(
                f"student.megatron.{name} = {given[name]!r} has no effect without "
                f"student.megatron.{needed}: set that too, or leave it out"
            )
    for name in ("overlap_param_gather", "pad_buckets_for_high_nccl_busbw"):
        if given.get(name) and not config.optimizer.use_distributed_optimizer:
            raise ConfigError(
                f"student.megatron.{name} needs optimizer.use_distributed_optimizer = true: set "
                "that, or leave it out"
            )
    if given.get("deallocate_pipeline_outputs") and parallel.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "student.megatron.deallocate_pipeline_outputs has no effect without "
            "student.parallel.pipeline_model_parallel_size > 1: set that, or leave it out"
        )
    bucket_size = given.get("bucket_size")
    if bucket_size is not None and bucket_size < 1:
        raise ConfigError(f"student.megatron.bucket_size must be at least 1, not {bucket_size}")
    _check_recompute(given, parallel)
    _check_group_size(given, parallel)


def _check_recompute(given: Mapping[str, Any], parallel: ParallelConfig) -> None:
    granularity = given.get("recompute_granularity")
    if granularity == "full":
        for name, example in (("recompute_method", "'uniform'"), ("recompute_num_layers", "1")):
            if given.get(name) is None:
                raise ConfigError(
                    "student.megatron.recompute_granularity = 'full' needs "
                    f"student.megatron.{name}, such as {example}"
                )
        if given["recompute_num_layers"] < 1:
            raise ConfigError(
                "student.megatron.recompute_num_layers must be at least 1, not "
                f"{given['recompute_num_layers']}"
            )
    others = ("recompute_modules",) if granularity == "full" else RECOMPUTE[1:3] + RECOMPUTE[4:]
    for name in others:
        if granularity is not None and given.get(name):
            raise ConfigError(
                f"student.megatron.{name} has no effect with "
                f"student.megatron.recompute_granularity = {granularity!r}: leave it out"
            )
    modules = given.get("recompute_modules")
    if modules is not None and len(set(modules)) != max(len(modules), 1):
        raise ConfigError(
            f"student.megatron.recompute_modules = {modules!r} must name at least one module, and "
            "each once: the default is ['core_attn']"
        )
    for module in modules or ():
        if module not in RECOMPUTED_MODULES:
            known = listed(repr(known) for known in RECOMPUTED_MODULES)
            raise ConfigError(
                f"student.megatron.recompute_modules has {module!r}; {known} can be computed again "
                "in these models"
            )
    if given.get("distribute_saved_activations") and (
        parallel.tensor_model_parallel_size == 1 or parallel.sequence_parallel
    ):
        raise ConfigError(
            "student.megatron.distribute_saved_activations needs "
            "student.parallel.tensor_model_parallel_size > 1 and "
            "student.parallel.sequence_parallel = false: set these, or leave it out"
        )


def _check_group_size(given: Mapping[str, Any], parallel: ParallelConfig) -> None:
    size = given.get("microbatch_group_size_per_vp_stage")
    if size is None:
        return
    if parallel.virtual_pipeline_model_parallel_size is None:
        raise ConfigError(
            f"student.megatron.microbatch_group_size_per_vp_stage = {size} has no effect without "
            "student.parallel.virtual_pipeline_model_parallel_size: set that, or leave it out"
        )
    if size < parallel.pipeline_model_parallel_size:
        raise ConfigError(
            f"student.megatron.microbatch_group_size_per_vp_stage = {size} must be at least "
            "student.parallel.pipeline_model_parallel_size = "
            f"{parallel.pipeline_model_parallel_size}"
        )
