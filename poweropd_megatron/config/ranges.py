"""What each setting must be on its own; objective.alpha depends on objective.kind: see rules."""

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from poweropd_megatron.config.evaluation_schema import EvaluationConfig
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.config.settings import EVALUATION, TRAIN
from poweropd_megatron.errors import ConfigError

RANGES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda value: value >= 1,
        (
            "train_steps",
            "global_batch_size",
            "mini_batch_size",
            "micro_batch_size",
            "max_tokens_per_microbatch",
            "save_interval",
            "student.parallel.tensor_model_parallel_size",
            "student.parallel.pipeline_model_parallel_size",
            "student.parallel.expert_model_parallel_size",
            "student.parallel.context_parallel_size",
            "teacher.parallel.tensor_model_parallel_size",
            "teacher.parallel.pipeline_model_parallel_size",
            "teacher.parallel.expert_model_parallel_size",
            "teacher.num_ranks",
            "teacher.parallel.context_parallel_size",
            "teacher.micro_batch_size",
            "teacher.max_tokens_per_microbatch",
            "objective.top_k",
            "rollout.num_samples_per_prompt",
            "rollout.max_new_tokens",
            "rollout.micro_batch_size",
            "rollout.num_parts",
            "optimizer.lr_decay_iters",
            "data.max_prompt_length",
            "eval.max_new_tokens",
            "eval.max_prompts",
            "checkpoint.interval",
            "checkpoint.keep_last",
            "telemetry.log_interval",
            "telemetry.diagnostics_interval",
        ),
    ),
    "at least 2, or not set": (
        lambda value: value >= 2,
        (
            "student.parallel.virtual_pipeline_model_parallel_size",
            "teacher.parallel.virtual_pipeline_model_parallel_size",
        ),
    ),
    "at least 0": (
        lambda value: 0 <= value < math.inf,
        (
            "rollout.top_k",
            "objective.window_after_tokens",
            "optimizer.min_lr",
            "optimizer.lr_warmup_iters",
            "optimizer.weight_decay",
            "optimizer.clip_grad",
            "eval.interval",
            "eval.num_samples",
            "eval.top_k",
            "telemetry.gradient_variance_interval",
            "telemetry.num_logged_samples",
        ),
    ),
    "at least 0 and less than 2**31": (lambda value: 0 <= value < 2**31, ("seed",)),
    "greater than 0 and at most 100000": (
        lambda value: 0 < value <= 100_000,
        ("distributed_timeout_minutes",),
    ),
    "greater than 0 and finite": (
        lambda value: 0 < value < math.inf,
        (
            "objective.clip_high",
            "objective.tau",
            "rollout.temperature",
            "optimizer.lr",
            "optimizer.adam_eps",
            "eval.temperature",
        ),
    ),
    "less than 0 and finite": (lambda value: -math.inf < value < 0, ("objective.clip_low",)),
    "greater than 0 and at most 1": (
        lambda value: 0 < value <= 1,
        ("objective.low_probability", "rollout.top_p", "eval.top_p"),
    ),
    "greater than 0 and at most 100": (
        lambda value: 0 < value <= 100,
        ("objective.window_first_percent",),
    ),
    "at least 0 and less than 1": (
        lambda value: 0 <= value < 1,
        ("objective.ratio_low", "optimizer.adam_beta1", "optimizer.adam_beta2"),
    ),
    "greater than 1 and finite": (lambda value: 1 < value < math.inf, ("objective.ratio_high",)),
    "not empty": (
        bool,
        (
            "output_dir",
            "student.path",
            "teacher.path",
            "data.train_files",
            "telemetry.wandb_project",
        ),
    ),
}
"""Each range in words, its test, and the settings that it holds for."""


def check_ranges(config: TrainConfig | EvaluationConfig) -> None:
    """Return if every setting that the command has is within its range.

    Raises: ConfigError that names the setting, its value and the range.
    """
    settings = (TRAIN if isinstance(config, TrainConfig) else EVALUATION).settings
    for expected, (holds, names) in RANGES.items():
        for name in (name for name in names if name in settings):
            value = attrgetter(name)(config)
            if value is not None and not holds(value):
                raise ConfigError(f"{name} must be {expected}, not {value!r}")
