"""What the student gains by a token that it drew, and how objective.kind names it.

Each reward is a file in objectives/sampled that registers itself; docs/objective.md says how to add
one. Shapes: N tokens; teacher_logp and student_logp are fp32 natural log-probs, at most 0.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from poweropd_megatron.config.objective import ObjectiveConfig, ObjectiveKind
from poweropd_megatron.objectives import sampled

Reward = Callable[[Tensor, Tensor], Tensor]
"""(teacher_logp, student_logp) -> reward, detached, of the same shape: each token's by itself."""


@dataclass(frozen=True)
class BatchReward:
    """A reward with statistics of the whole batch.

    fit: from (teacher_logp_N, student_logp_N) of all tokens in the loss, taken before the weights
    change, to the reward of each token.
    """

    fit: Callable[[Tensor, Tensor], Reward]


Builder = Callable[[ObjectiveConfig], Reward | BatchReward]
_BUILDERS: dict[ObjectiveKind, Builder] = {}


def register(kind: ObjectiveKind) -> Callable[[Builder], Builder]:
    """Return a decorator that makes a function of the settings the reward of `kind`."""

    def add(builder: Builder) -> Builder:
        assert kind not in _BUILDERS, f"objective.kind = {kind!r} has two rewards"
        _BUILDERS[kind] = builder
        return builder

    return add


def builders() -> dict[ObjectiveKind, Builder]:
    """Return what makes the reward of each kind from the settings: all files in objectives/sampled.

    Cost: an import of each the first time.
    """
    for module in pkgutil.iter_modules(sampled.__path__):
        importlib.import_module(f"{sampled.__name__}.{module.name}")
    return _BUILDERS


def build_reward(objective: ObjectiveConfig) -> Reward | BatchReward:
    """Return the reward that the settings ask for, normalized over the batch if they say so."""
    reward = builders()[objective.kind](objective)
    if objective.reward_normalization == "none":
        return reward
    from poweropd_megatron.objectives.sampled.sign_max_abs import fit_sign_max_abs
    from poweropd_megatron.objectives.sampled.z_score import fit_z_score

    fits = {"z_score": fit_z_score, "sign_max_abs": fit_sign_max_abs}
    assert not isinstance(reward, BatchReward)
    return BatchReward(partial(fits[objective.reward_normalization], reward))
