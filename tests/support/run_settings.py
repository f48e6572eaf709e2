"""The settings of small runs on fp32 models."""

from pathlib import Path
from typing import Any

from poweropd_megatron.config.schema import (
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)


def small_run(
    student: Path,
    teacher: Path | None = None,
    *,
    objective: ObjectiveConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    data: DataConfig | None = None,
    **top: Any,
) -> TrainConfig:
    """Return settings for eight responses a step; the teacher is the student unless it is given."""
    settings: dict[str, Any] = {
        "output_dir": "unused",
        "train_steps": 10,
        "global_batch_size": 8,
        "micro_batch_size": 2,
    }
    return TrainConfig(
        student=StudentConfig(path=str(student), dtype="fp32"),
        teacher=TeacherConfig(path=str(teacher or student), dtype="fp32", micro_batch_size=3),
        objective=objective or ObjectiveConfig(),
        optimizer=optimizer or OptimizerConfig(),
        data=data or DataConfig(train_files=["unused"]),
        **(settings | top),
    )
