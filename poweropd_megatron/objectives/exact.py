"""Objectives over the whole vocabulary, as objective.kind names them."""

from functools import partial

from poweropd_megatron.config.objective import ObjectiveConfig
from poweropd_megatron.objectives.rewards import Reward
from poweropd_megatron.objectives.sampled.log_ratio import log_ratio_reward
from poweropd_megatron.objectives.sampled.power import power_reward
from poweropd_megatron.ops.vocabulary_objectives import (
    ForwardKL,
    PowerExact,
    ReverseKL,
    TopKForwardKL,
    TopKReverseKL,
    VocabularyObjective,
)


def build_vocabulary_objective(objective: ObjectiveConfig) -> VocabularyObjective | None:
    """Return the objective that the settings ask for; None if they reward drawn tokens."""
    match objective.kind:
        case "reverse_kl":
            return ReverseKL()
        case "power_exact":
            return PowerExact(objective.alpha)
        case "forward_kl":
            return ForwardKL()
        case "topk_reverse_kl":
            return TopKReverseKL(objective.top_k)
        case "topk_forward_kl":
            return TopKForwardKL(objective.top_k)
        case _:
            return None


def reward_to_show(objective: ObjectiveConfig) -> Reward:
    """Return what the metrics show as rewards of drawn tokens, which nothing is trained on.

    power_exact is the power reward in expectation, reverse_kl the log-ratio; the others have no
    reward, and show the log-ratio for comparison.
    """
    if objective.kind == "power_exact":
        return partial(power_reward, alpha=objective.alpha)
    return log_ratio_reward
