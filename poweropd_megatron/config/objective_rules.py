"""What the settings of the objective must be together."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from poweropd_megatron.config.choices import divisors, listed
from poweropd_megatron.config.objective import (
    DECIDING,
    KINDS,
    ObjectiveConfig,
    unused_settings,
    window_end,
)
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.errors import ConfigError

FP32_RANGE = (1.2e-38, 3.4e38)
"""Of the parameters of rewards, which are computed in fp32."""
_PREFIX = "objective."


def check_objective(objective: ObjectiveConfig) -> None:
    """Return if every parameter is in its range, and none is set that the others make useless.

    Raises: ConfigError that names the setting and what would work.
    """
    values, defaults = dataclasses.asdict(objective), dataclasses.asdict(ObjectiveConfig())
    refuse_unused({name for name, value in values.items() if value != defaults[name]}, values)
    smallest, largest = FP32_RANGE
    if "alpha" in KINDS[objective.kind].settings and not smallest <= objective.alpha <= largest:
        raise ConfigError(
            f"objective.alpha must be > 0 and finite in fp32, not {objective.alpha}; "
            "for the log-ratio limit set objective.kind = 'log_ratio'"
        )
    if KINDS[objective.kind].family == "exact" and objective.terminal not in ("raw", "mask"):
        raise ConfigError(
            f"objective.terminal = {objective.terminal!r} scores another token in the EOS's place, "
            f"but objective.kind = {objective.kind!r} compares all tokens: use 'mask' or 'raw'"
        )
    if objective.kind == "constant_negative":
        _check_constant_negative(objective)
    if objective.kind == "tanh" and not smallest <= objective.tau <= largest:
        raise ConfigError(f"objective.tau must be > 0 and finite in fp32, not {objective.tau}")


def _check_constant_negative(objective: ObjectiveConfig) -> None:
    if objective.terminal == "cross_eos":
        raise ConfigError(
            "objective.terminal = 'cross_eos' changes the teacher's score of the EOS alone, but "
            "objective.kind = 'constant_negative' takes nothing from the teacher: use 'raw', which "
            "comes to the same, 'mask' or 'im_end'"
        )
    if objective.reward_normalization == "z_score":
        raise ConfigError(
            "objective.reward_normalization = 'z_score' would reward the tokens that "
            "objective.kind = 'constant_negative' leaves at 0: leave it out"
        )


def refuse_unused(given: Collection[str], objective: Mapping[str, Any]) -> None:
    """Return if the objective uses each of the names in [objective] that were given.

    Raises: ConfigError that names the setting, its value and why it has no effect.
    """
    for name, why in unused_settings(objective).items():
        if name in given:
            raise ConfigError(
                f"objective.{name} = {objective[name]!r} would have no effect: {why}. Leave it out"
            )


def settled(
    values: Mapping[str, Any], before: Mapping[str, Any], given: Collection[str]
) -> dict[str, Any]:
    """Return settings by dotted name, without what a file said of another kind of objective.

    A recipe's alpha is the power reward's: who sets objective.kind = 'log_ratio' on top of it, in a
    later file or on the command line, needn't take it out. `given` are the names that came on top
    of `before`, and `values` both together.
    """
    if all(values.get(_PREFIX + name) == before.get(_PREFIX + name) for name in DECIDING):
        return dict(values)
    objective = of_objective(values)
    dropped = {_PREFIX + name for name in unused_settings(objective)} - set(given)
    return {name: value for name, value in values.items() if name not in dropped}


def of_objective(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of [objective] by their names there, from all by dotted name."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in values.items()
        if name.startswith(_PREFIX)
    }


def check_window(config: TrainConfig) -> None:
    """Return if a response can be long enough for the window to leave some of its tokens.

    Raises: ConfigError that names the settings and the largest value that would work.
    """
    objective, longest = config.objective, config.rollout.max_new_tokens
    end = window_end(longest, objective.window_first_percent)
    if objective.window_after_tokens >= end:
        raise ConfigError(
            f"objective.window_after_tokens = {objective.window_after_tokens} leaves no token in "
            f"the loss: with window_first_percent = {objective.window_first_percent:g} at most the "
            f"first {end} of rollout.max_new_tokens = {longest} count; use at most {end - 1}"
        )


def check_mini_batch(config: TrainConfig) -> None:
    """Return if the batch can be taken in mini-batches. Raises: ConfigError with what would do."""
    mini, batch = config.mini_batch_size, config.global_batch_size
    if mini is not None and batch % mini:
        raise ConfigError(
            f"mini_batch_size = {mini} must divide global_batch_size = {batch}; "
            f"{listed(divisors(batch))} would work"
        )
