"""The recipe of the paper's setting: its numbers, written out here a second time."""

import operator
from pathlib import Path

import pytest

from poweropd_megatron.config.load import parse_train_config

RECIPE = Path(__file__).resolve().parents[2] / "launch/recipes/qwen3_1p7b_from_4b.toml"

PAPER = {
    "train_steps": 1500,
    "global_batch_size": 32,
    "student.dtype": "bf16",
    "teacher.dtype": "bf16",
    "rollout.num_samples_per_prompt": 1,
    "rollout.max_new_tokens": 1024,
    "rollout.temperature": 1.0,
    "rollout.top_p": 0.95,
    "rollout.top_k": 20,
    "objective.kind": "power",
    "objective.alpha": 5.0,
    "objective.terminal": "mask",
    "optimizer.lr": 5e-7,
    "optimizer.lr_decay_style": "constant",
    "optimizer.lr_warmup_iters": 0,
    "data.apply_chat_template": True,
    "data.chat_template_kwargs": {"enable_thinking": False},
    "data.answer_check": "math",
    "eval.interval": 30,
    "eval.num_samples": 8,
    "eval.temperature": 0.6,
    "eval.max_new_tokens": 4096,
}
"""arXiv 2606.17199v1 and the script that its authors released."""

MODELS = {"student.path": "Qwen3-1.7B-Base", "teacher.path": "Qwen3-4B"}
BENCHMARKS = ["gsm8k", "math500", "amc23", "aime24", "aime25", "minerva", "olympiadbench"]


@pytest.fixture(scope="module")
def value():
    """Return a function from a setting's dotted name to its value in the recipe."""
    config = parse_train_config(["--config", str(RECIPE)])
    return lambda name: operator.attrgetter(name)(config)


@pytest.mark.parametrize(("name", "expected"), PAPER.items())
def test_a_setting_is_the_papers(name, expected, value):
    assert value(name) == expected


def test_the_models_and_files_are_the_papers(value):
    assert {name: Path(value(name)).name for name in MODELS} == MODELS
    assert [Path(file).stem for file in value("data.train_files")] == ["deepscaler"]
    assert [Path(file).stem for file in value("data.eval_files")] == BENCHMARKS
