"""What the settings of `poweropd eval` must be together, and what may change when it goes on."""

from poweropd_megatron.config.answering import check_answering, check_prompts
from poweropd_megatron.config.evaluation_schema import EvaluationConfig
from poweropd_megatron.config.parallel import check_logits, check_parallel
from poweropd_megatron.config.ranges import check_ranges
from poweropd_megatron.config.ranks import check_fit
from poweropd_megatron.errors import ConfigError

CHANGEABLE_IN_EVALUATION = (
    "output_dir",
    "save_interval",
    "distributed_timeout_minutes",
    "student.path",
    "student.parallel.*",
    "student.megatron*",
    "rollout.*",
    "eval.pass_at",
)
"""Settings that leave the samples of an evaluation that goes on as they are; the model itself is
told by its files' digest."""


def check_evaluation(config: EvaluationConfig, world_size: int | None = None) -> None:
    """Return if the settings can work together, on world_size ranks where that is known.

    Reads no file. Raises: ConfigError that names the settings and what would work.
    """
    check_ranges(config)
    if not config.data.eval_files:
        raise ConfigError("data.eval_files is empty: name at least one file of prompts")
    check_prompts(config.data)
    check_answering(config.eval)
    check_logits("logits_dtype", config.logits_dtype, "student", config.student.dtype)
    check_parallel("student", config.student.parallel)
    if world_size is not None:
        check_fit("student", config.student.parallel, world_size)
