"""A small valid run's settings, with changes."""

import operator

from poweropd_megatron.config.schema import DataConfig, StudentConfig, TeacherConfig, TrainConfig


def config_with(**changes: object) -> TrainConfig:
    """Return a small valid run with changes under dotted names (__ for a dot)."""
    config = TrainConfig(
        output_dir="runs/x",
        train_steps=10,
        global_batch_size=12,
        student=StudentConfig(path="student"),
        teacher=TeacherConfig(path="teacher"),
        data=DataConfig(train_files=["a.jsonl"]),
    )
    for name, value in changes.items():
        assign(config, name.replace("__", "."), value)
    return config


def assign(config: TrainConfig, name: str, value: object) -> None:
    table, _, field = name.rpartition(".")
    owner = operator.attrgetter(table)(config) if table else config
    assert hasattr(owner, field)
    setattr(owner, field, value)
