"""Rules between settings: what is refused, what the message offers, and that the offer works."""

import copy
import math
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.changed_config import assign, config_with

from poweropd_megatron.config.load import parse_train_config
from poweropd_megatron.config.ranges import RANGES
from poweropd_megatron.config.rules import check
from poweropd_megatron.config.schema import (
    TrainConfig,
)
from poweropd_megatron.config.settings import SETTINGS
from poweropd_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"chain_sum": 2, "qwen3_1p7b_from_4b": 8}

INTEGERS = {name for name, s in SETTINGS.items() if s.type in (int, int | None)}
FLOATS = {name for name, s in SETTINGS.items() if s.type is float}


def message_of(config: TrainConfig, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check(config, world_size)
    return str(caught.value)


@pytest.mark.parametrize(("recipe", "world_size"), RECIPES.items())
def test_recipes_are_valid_on_the_ranks_that_they_are_for(recipe, world_size):
    config = parse_train_config(["--config", str(ROOT / f"launch/recipes/{recipe}.toml")])
    check(config, world_size)
    assert config.output_dir == f"runs/{recipe}"


def test_every_number_has_a_range():
    ranged = [name for _, names in RANGES.values() for name in names]
    assert len(ranged) == len(set(ranged))
    assert {*ranged, "objective.alpha"} >= INTEGERS | FLOATS


OUTSIDE = {
    "at least 1": (0, -3),
    "at least 2, or not set": (1, 0, -2),
    "at least 0": (-1, -1e-9, math.inf, math.nan),
    "at least 0 and less than 2**31": (-1, 2**31),
    "greater than 0 and at most 100000": (0, -1.0, 100_001, math.inf, math.nan),
    "greater than 0 and finite": (0, -1.0, math.inf, math.nan),
    "less than 0 and finite": (0, 1.0, -math.inf, math.nan),
    "greater than 0 and at most 1": (0, 1.001, -0.1, math.nan),
    "greater than 0 and at most 100": (0, -1.0, 100.1, math.inf, math.nan),
    "greater than 1 and finite": (1, 0.5, math.inf, math.nan),
    "at least 0 and less than 1": (-0.1, 1, math.nan),
    "not empty": ("", []),
}
INSIDE = {
    "at least 1": (1,),
    "at least 2, or not set": (),
    "at least 0": (0,),
    "at least 0 and less than 2**31": (0, 2**31 - 1),
    "greater than 0 and at most 100000": (1e-12, 100_000),
    "greater than 0 and finite": (1e-12,),
    "less than 0 and finite": (-1e-9, -5.0),
    "greater than 0 and at most 1": (1e-12, 1),
    "greater than 0 and at most 100": (1e-12, 100),
    "greater than 1 and finite": (1.001, 1e9),
    "at least 0 and less than 1": (0, 0.999),
    "not empty": (),
}
USED_WITH = {
    "objective.clip_low": {"objective__kind": "clip"},
    "objective.clip_high": {"objective__kind": "clip"},
    "objective.tau": {"objective__kind": "tanh"},
    "objective.top_k": {"objective__kind": "topk_reverse_kl"},
    "objective.low_probability": {"objective__kind": "constant_negative"},
    "objective.ratio_low": {"objective__importance_ratio": "token"},
    "objective.ratio_high": {"objective__importance_ratio": "sequence"},
}
"""What else has to be set so that a setting has an effect."""


@pytest.mark.parametrize(
    ("expected", "name"),
    [(words, name) for words, (_, names) in RANGES.items() for name in names if name in SETTINGS],
)
def test_a_value_outside_its_range_is_refused_by_name(expected, name):
    for value in OUTSIDE[expected]:
        message = message_of(config_with(**{name: value}))
        assert message == f"{name} must be {expected}, not {value!r}"
    for value in INSIDE[expected]:
        config = config_with(**{name: value}, **USED_WITH.get(name, {}))
        config.optimizer.lr_warmup_iters = 0
        config.data.eval_files = ["e.jsonl"]
        check(config)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_the_power_reward_needs_a_positive_alpha(alpha):
    message = message_of(config_with(objective__alpha=alpha))
    assert message.startswith("objective.alpha must be > 0")
    assert "objective.kind = 'log_ratio'" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"optimizer.min_lr": 2.0, "optimizer.lr": 1.0},
            "optimizer.min_lr = 2.0 must not exceed optimizer.lr = 1.0",
        ),
        (
            {"optimizer.lr_warmup_iters": 10},
            "optimizer.lr_warmup_iters = 10 must be less than train_steps = 10: use at most 9",
        ),
        (
            {"optimizer.lr_warmup_iters": 5, "optimizer.lr_decay_iters": 5},
            "must be less than optimizer.lr_decay_iters = 5: use at most 4",
        ),
        (
            {"rollout.num_samples_per_prompt": 5},
            "rollout.num_samples_per_prompt = 5 must divide global_batch_size = 12; "
            "1, 2, 3, 4, 6 or 12 would work",
        ),
        (
            {
                "telemetry.gradient_variance_interval": 5,
                "rollout.num_samples_per_prompt": 12,
            },
            "telemetry.gradient_variance_interval compares prompts: it needs two or more in an "
            "optimizer step, each with its 12 samples, but global_batch_size = 12",
        ),
        (
            {"student.parallel.sequence_parallel": True},
            "student.parallel.sequence_parallel = true needs "
            "student.parallel.tensor_model_parallel_size > 1, not 1",
        ),
        (
            {"teacher.parallel.sequence_parallel": True},
            "teacher.parallel.sequence_parallel = true needs "
            "teacher.parallel.tensor_model_parallel_size > 1, not 1",
        ),
        (
            {"student.parallel.virtual_pipeline_model_parallel_size": 2},
            "student.parallel.virtual_pipeline_model_parallel_size = 2 needs "
            "student.parallel.pipeline_model_parallel_size > 1, not 1: raise it, or leave out",
        ),
        (
            {"eval.interval": 7},
            "eval.interval = 7 needs data.eval_files, which is empty: name the files there, or set "
            "eval.interval = 0",
        ),
        (
            {"eval.num_samples": 0, "eval.greedy": False, "data.eval_files": ["e.jsonl"]},
            "eval.num_samples = 0 with eval.greedy = false leaves no answer to evaluate",
        ),
        (
            {"data.answer_marker": ""},
            "data.answer_marker must not be empty with data.answer_check = 'exact'",
        ),
        (
            {"data.chat_template_kwargs": {"enable_thinking": False}},
            "data.chat_template_kwargs = {'enable_thinking': False} needs "
            "data.apply_chat_template = true",
        ),
    ],
)
def test_a_combination_that_cannot_work_names_settings_values_and_fix(changes, words):
    assert words in message_of(config_with(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.min_lr": 1.0, "optimizer.lr": 1.0},
        {"optimizer.lr_warmup_iters": 9},
        {"optimizer.lr_warmup_iters": 4, "optimizer.lr_decay_iters": 5},
        {"eval.interval": 0},
        {"eval.num_samples": 0, "data.eval_files": ["e.jsonl"]},
        {"eval.greedy": False, "data.eval_files": ["e.jsonl"]},
        {"data.answer_marker": "", "data.answer_check": "math"},
        {"data.chat_template_kwargs": {"x": 1}, "data.apply_chat_template": True},
        {
            "student.parallel.sequence_parallel": True,
            "student.parallel.tensor_model_parallel_size": 2,
        },
        {
            "student.parallel.virtual_pipeline_model_parallel_size": 2,
            "student.parallel.pipeline_model_parallel_size": 2,
        },
    ],
)
def test_a_combination_that_can_work_is_accepted(changes):
    check(config_with(**changes))


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_the_ranks_must_hold_whole_copies_of_each_model(model):
    config = config_with()
    parallel = getattr(config, model).parallel
    parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size = 2, 3
    check(config, 12)
    message = message_of(config, 8)
    assert f"{model}.parallel.tensor_model_parallel_size = 2" in message
    assert f"{model}.parallel.pipeline_model_parallel_size = 3" in message
    assert (
        "ranks (8): start 6 or 12 ranks, or choose sizes whose product is 1, 2, 4 or 8" in message
    )


def test_a_batch_that_the_ranks_cannot_share_says_what_would_work():
    config = config_with(micro_batch_size=5, rollout__num_samples_per_prompt=3)
    config.student.parallel.tensor_model_parallel_size = 2
    assert message_of(config, 8) == (
        "global_batch_size = 12 must be a multiple of micro_batch_size = 5 times the student's "
        "data-parallel size = 4 (8 ranks / 2 model-parallel): set global_batch_size to 60, "
        "or micro_batch_size to 1 or 3"
    )


def test_packing_takes_any_batch_that_has_a_response_for_each_rank():
    """micro_batch_size, which must divide a rank's share otherwise, isn't used then."""
    config = config_with(micro_batch_size=5, max_tokens_per_microbatch=100)
    for world_size in (1, 5, 12):
        check(config, world_size)
    config.student.parallel.tensor_model_parallel_size = 2
    assert message_of(config, 26) == (
        "global_batch_size = 12 must be at least the student's data-parallel size = 13 "
        "(26 ranks / 2 model-parallel): each rank needs a response"
    )


@given(
    batch=st.integers(1, 64),
    micro=st.integers(1, 9),
    samples=st.integers(1, 4),
    tensor=st.sampled_from([1, 2]),
    data_parallel=st.integers(1, 6),
)
def test_every_batch_size_that_a_message_offers_is_accepted(
    batch, micro, samples, tensor, data_parallel
):
    assume(batch % samples == 0)
    config = config_with(
        global_batch_size=batch, micro_batch_size=micro, rollout__num_samples_per_prompt=samples
    )
    config.student.parallel.tensor_model_parallel_size = tensor
    world_size = tensor * data_parallel
    if batch % (micro * data_parallel) == 0:
        check(config, world_size)
        return
    fixes = message_of(config, world_size).rpartition(": set ")[2].split(", or ")
    for fix in fixes:
        name, _, values = fix.partition(" to ")
        for value in map(int, re.findall(r"\d+", values)):
            fixed = copy.deepcopy(config)
            assign(fixed, name, value)
            check(fixed, world_size)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_context_parallel_ranks_take_part_in_what_divides_the_world(name):
    config = config_with(**{f"{name}.parallel.context_parallel_size": 3})
    message = message_of(config, 4)
    assert f"{name}.parallel.context_parallel_size = 3 must divide the number of ranks" in message
    assert "start 3 or 6 ranks, or choose sizes whose product is 1, 2 or 4" in message
    check(config, 6)


def test_context_parallel_ranks_share_their_part_of_the_batch():
    """Of eight ranks four in pairs work on a response each, so that twelve are three rounds."""
    config = config_with(**{"student.parallel.context_parallel_size": 2})
    check(config, 8)
    message = message_of(config_with(), 8)
    assert "the student's data-parallel size = 8 (8 ranks / 1 model-parallel)" in message
    config.global_batch_size = 6
    message = message_of(config, 8)
    assert "the student's data-parallel size = 4 (8 ranks / 2 model-parallel)" in message
