"""What a resumed run may change: everything that leaves the training as it was, and no more."""

import dataclasses
import json

import pytest

from poweropd_megatron.config.load import parse_train_config
from poweropd_megatron.config.rules import frozen_differences
from poweropd_megatron.config.settings import SETTINGS

MAY_CHANGE = [
    "output_dir",
    "train_steps",
    "micro_batch_size",
    "max_tokens_per_microbatch",
    "distributed_timeout_minutes",
    "student.parallel.tensor_model_parallel_size",
    "student.parallel.pipeline_model_parallel_size",
    "student.parallel.expert_model_parallel_size",
    "student.parallel.virtual_pipeline_model_parallel_size",
    "student.parallel.context_parallel_size",
    "student.parallel.sequence_parallel",
    "student.megatron",
    "teacher.parallel.tensor_model_parallel_size",
    "teacher.parallel.pipeline_model_parallel_size",
    "teacher.parallel.expert_model_parallel_size",
    "teacher.parallel.virtual_pipeline_model_parallel_size",
    "teacher.parallel.context_parallel_size",
    "teacher.parallel.sequence_parallel",
    "teacher.megatron",
    "teacher.num_ranks",
    "teacher.offload",
    "teacher.micro_batch_size",
    "teacher.max_tokens_per_microbatch",
    "rollout.micro_batch_size",
    "rollout.num_parts",
    "objective.head",
    "eval.interval",
    "checkpoint.interval",
    "checkpoint.keep_last",
    "telemetry.log_interval",
    "telemetry.diagnostics_interval",
    "telemetry.gradient_variance_interval",
    "telemetry.num_logged_samples",
    "telemetry.tensorboard",
    "telemetry.wandb",
    "telemetry.wandb_project",
]


def run_with(changed: str | None = None) -> dict[str, object]:
    """Return a resolved config of made-up values, one of which may have changed."""
    config: dict[str, object] = {}
    for name in SETTINGS:
        *tables, field = name.split(".")
        owner = config
        for table in tables:
            owner = owner.setdefault(table, {})
        owner[field] = "new" if name == changed else "old"
    return config


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_may_change_only_what_leaves_the_training_alone(name):
    lines = frozen_differences(run_with(), run_with(changed=name))
    assert lines == ([] if name in MAY_CHANGE else [f"{name}: was 'old', is 'new'"])


def test_differences_survive_json_and_show_tables_key_by_key():
    arguments = [
        *("--output_dir=o", "--train_steps=2", "--global_batch_size=2", "--student.path=s"),
        *("--teacher.path=t", '--data.train_files=["a"]', "--data.apply_chat_template=true"),
    ]
    old, new = (
        dataclasses.asdict(parse_train_config([*arguments, *changes]))
        for changes in (
            ["--objective.alpha=5"],
            [
                "--objective.alpha=1",
                "--optimizer.clip_grad=2",
                "--data.chat_template_kwargs={enable_thinking = false}",
            ],
        )
    )
    saved = json.loads(json.dumps(old))
    assert frozen_differences(saved, old) == []
    assert frozen_differences(saved, new) == [
        "objective.alpha: was 5.0, is 1.0",
        "optimizer.clip_grad: was 1.0, is 2.0",
        "data.chat_template_kwargs.enable_thinking: was not set, is False",
    ]


def resolved(*changes):
    return dataclasses.asdict(
        parse_train_config(
            [
                *("--output_dir=o", "--train_steps=6", "--global_batch_size=2", "--student.path=s"),
                *("--teacher.path=t", '--data.train_files=["a"]', *changes),
            ]
        )
    )


def test_more_steps_may_not_stretch_a_decay_unnoticed():
    decays = "--optimizer.lr_decay_style=cosine"
    old = resolved(decays)
    assert frozen_differences(old, resolved(decays, "--train_steps=9")) == [
        "optimizer.lr_decay_iters: was 6, is 9"
    ]
    kept = resolved(decays, "--train_steps=9", "--optimizer.lr_decay_iters=6")
    assert frozen_differences(old, kept) == []


def test_more_steps_at_a_constant_learning_rate_are_no_difference():
    assert frozen_differences(resolved(), resolved("--train_steps=9")) == []


def test_a_setting_that_an_older_release_did_not_have_had_its_default():
    old = resolved()
    del old["objective"]["terminal"]
    assert frozen_differences(old, resolved()) == []
    assert frozen_differences(old, resolved("--objective.terminal=raw")) == [
        "objective.terminal: was 'mask', is 'raw'"
    ]
