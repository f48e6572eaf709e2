"""What the settings must be together, and what a resumed run may change."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from poweropd_megatron.config.answering import check_answering, check_prompts
from poweropd_megatron.config.choices import divisors, listed
from poweropd_megatron.config.experts import check_experts, check_recomputed
from poweropd_megatron.config.objective import unused_settings
from poweropd_megatron.config.objective_rules import (
    check_mini_batch,
    check_objective,
    check_window,
    of_objective,
)
from poweropd_megatron.config.parallel import (
    check_exchanged_heads,
    check_logits,
    check_parallel,
)
from poweropd_megatron.config.pipeline import check_pipeline
from poweropd_megatron.config.ranges import check_ranges
from poweropd_megatron.config.ranks import check_ranks
from poweropd_megatron.config.schema import (
    EvalConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from poweropd_megatron.config.settings import TRAIN, Schema
from poweropd_megatron.errors import ConfigError

CHANGEABLE_ON_RESUME = (
    "output_dir",
    "train_steps",
    "micro_batch_size",
    "max_tokens_per_microbatch",
    "distributed_timeout_minutes",
    "student.parallel.*",
    "student.megatron*",
    "teacher.parallel.*",
    "teacher.megatron*",
    "teacher.num_ranks",
    "teacher.offload",
    "teacher.micro_batch_size",
    "teacher.max_tokens_per_microbatch",
    "rollout.micro_batch_size",
    "rollout.num_parts",
    "objective.head",
    "eval.interval",
    "checkpoint.*",
    "telemetry.*",
)
"""Settings that leave the training of a resumed run as it was; the others are frozen."""

_MAKES_MICRO_BATCHES = ("micro_batch_size", "max_tokens_per_microbatch", "student.parallel.*")
"""Of these, what objective.loss_normalization = 'micro_batch_mean' makes a part of training."""


def check(config: TrainConfig, world_size: int | None = None) -> None:
    """Return if the settings can work together, on world_size ranks where that is known.

    Reads no file; what depends on the models is for check_model_layout.

    Raises: ConfigError that names the settings, gives their values and what would work.
    """
    check_ranges(config)
    check_objective(config.objective)
    check_window(config)
    check_mini_batch(config)
    _check_logits(config)
    _check_schedule(config.optimizer, config.train_steps)
    check_prompts(config.data)
    _check_evaluation(config.eval, config.data.eval_files)
    _check_samples(config)
    for name, model in (("student", config.student), ("teacher", config.teacher)):
        check_parallel(name, model.parallel)
    _check_teacher_ranks(config)
    _check_gradient_variance(config)
    if world_size is not None:
        check_ranks(config, world_size)


def check_model_layout(
    name: Literal["student", "teacher"],
    parallel: ParallelConfig,
    megatron: Mapping[str, Any],
    *,
    num_layers: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    ffn_hidden_size: int,
    num_moe_experts: int | None,
) -> None:
    """Return if the layout can cut a model of this shape: heads and widths into equal parts.

    With more tensor-parallel ranks than key-value heads, several ranks share one of these.

    num_moe_experts is None for a dense model; the others' feed-forward is not cut.

    Raises: ConfigError that names the parallel size and the sizes that would work.
    """
    check_experts(name, parallel, num_moe_experts)
    check_recomputed(name, megatron, num_moe_experts)
    qkv_rows = (num_attention_heads + 2 * num_query_groups) * kv_channels

    def problem(size: int) -> str | None:
        if num_attention_heads % size:
            return f"divide the {name}'s attention heads ({num_attention_heads})"
        if num_query_groups % size and size % num_query_groups:
            return f"divide the {name}'s key-value heads ({num_query_groups}), or be a multiple"
        if qkv_rows % size:
            return f"divide the rows of the {name}'s linear_qkv ({qkv_rows})"
        if num_moe_experts is None and ffn_hidden_size % size:
            return f"divide the {name}'s feed-forward size ({ffn_hidden_size})"
        return None

    tensor = parallel.tensor_model_parallel_size
    if wrong := problem(tensor):
        working = [size for size in divisors(num_attention_heads) if not problem(size)]
        raise ConfigError(
            f"{name}.parallel.tensor_model_parallel_size = {tensor} must {wrong}; "
            f"{listed(working)} would work"
        )
    check_exchanged_heads(
        name, parallel, megatron, heads=num_attention_heads, groups=num_query_groups
    )
    check_pipeline(name, parallel, megatron, num_layers)


def frozen_differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    schema: Schema = TRAIN,
    changeable: Sequence[str] = CHANGEABLE_ON_RESUME,
) -> list[str]:
    """Return a line for each setting that differs and that a resumed run may not change.

    schema: that of the settings; changeable: patterns of the names that may differ.

    Both are dataclasses.asdict of the schema's root, or flat by dotted name; what `old` doesn't
    have, being of an older release, had its default. A line reads "objective.alpha: was 5.0, is
    1.0".
    """
    defaults = {
        name: setting.default for name, setting in schema.settings.items() if not setting.required
    }
    before = _effective(dict(_flatten(defaults)) | dict(_flatten(old)))
    after = _effective(dict(_flatten(new)))
    if after.get("objective.loss_normalization") == "micro_batch_mean":
        changeable = [name for name in changeable if name not in _MAKES_MICRO_BATCHES]
    unused = {
        f"objective.{name}"
        for settings in (before, after)
        if schema is TRAIN
        for name in unused_settings(of_objective(settings))
    }
    return [
        f"{name}: was {_shown(before.get(name))}, is {_shown(after.get(name))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
        and name not in unused
        and not any(fnmatchcase(name, pattern) for pattern in changeable)
    ]


def _effective(settings: dict[str, Any]) -> dict[str, Any]:
    """Return flat settings with the decay's end in place: more train_steps would move it."""
    if settings.get("optimizer.lr_decay_style", "constant") == "constant":
        return settings | {"optimizer.lr_decay_iters": None}
    end = settings.get("optimizer.lr_decay_iters") or settings.get("train_steps")
    return settings | {"optimizer.lr_decay_iters": end}


def _check_logits(config: TrainConfig) -> None:
    for name, model in (("student", config.student), ("teacher", config.teacher)):
        check_logits("objective.logits_dtype", config.objective.logits_dtype, name, model.dtype)


def _check_schedule(optimizer: OptimizerConfig, train_steps: int) -> None:
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr = {optimizer.min_lr} must not exceed optimizer.lr = {optimizer.lr}"
        )
    name, end = "optimizer.lr_decay_iters", optimizer.lr_decay_iters
    if end is None:
        name, end = "train_steps", train_steps
    if optimizer.lr_warmup_iters >= end:
        raise ConfigError(
            f"optimizer.lr_warmup_iters = {optimizer.lr_warmup_iters} must be less than "
            f"{name} = {end}: use at most {end - 1}"
        )


def _check_evaluation(evaluation: EvalConfig, eval_files: Sequence[str]) -> None:
    if eval_files:
        check_answering(evaluation)
    elif evaluation.interval not in (0, EvalConfig().interval):
        raise ConfigError(
            f"eval.interval = {evaluation.interval} needs data.eval_files, which is empty: "
            "name the files there, or set eval.interval = 0"
        )


def _check_samples(config: TrainConfig) -> None:
    samples, batch = config.rollout.num_samples_per_prompt, config.global_batch_size
    if batch % samples:
        raise ConfigError(
            f"rollout.num_samples_per_prompt = {samples} must divide global_batch_size = {batch}; "
            f"{listed(divisors(batch))} would work"
        )


def _check_teacher_ranks(config: TrainConfig) -> None:
    parts, batch = config.rollout.num_parts, config.global_batch_size
    if parts > 1 and config.teacher.num_ranks is None:
        raise ConfigError(
            f"rollout.num_parts = {parts} needs teacher.num_ranks: a teacher that shares the "
            "student's ranks can't score while they generate. Set that, or rollout.num_parts = 1"
        )
    if config.teacher.offload and config.teacher.num_ranks is not None:
        raise ConfigError(
            "teacher.offload = true makes room for the student, which with teacher.num_ranks = "
            f"{config.teacher.num_ranks} is on other ranks: leave out either"
        )
    if batch % parts:
        raise ConfigError(
            f"rollout.num_parts = {parts} must divide global_batch_size = {batch}; "
            f"{listed(divisors(batch))} would work"
        )


def _check_gradient_variance(config: TrainConfig) -> None:
    samples = config.rollout.num_samples_per_prompt
    name = "global_batch_size" if config.mini_batch_size is None else "mini_batch_size"
    size = config.mini_batch_size or config.global_batch_size
    if config.telemetry.gradient_variance_interval and (size % samples or size < 2 * samples):
        raise ConfigError(
            "telemetry.gradient_variance_interval compares prompts: it needs two or more in an "
            f"optimizer step, each with its {samples} samples, but {name} = {size}: use a larger "
            "multiple of rollout.num_samples_per_prompt, or leave the interval 0"
        )


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
