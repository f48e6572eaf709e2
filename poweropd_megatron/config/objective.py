"""The settings of the objective: its kinds, and which of the others each kind uses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

ObjectiveKind = Literal[
    "power",
    "log_ratio",
    "clip",
    "tanh",
    "z_score",
    "prob_diff",
    "sqrt_diff",
    "box_cox",
    "constant_negative",
    "reverse_kl",
    "power_exact",
    "forward_kl",
    "topk_reverse_kl",
    "topk_forward_kl",
]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One objective.

    family: "sampled" has a reward for each token that was drawn, which weighs its log-prob; "exact"
    compares both models' distributions at it, over the whole vocabulary.
    settings: those names in [objective] that not every kind uses, but this one does.
    """

    family: Literal["sampled", "exact"] = "sampled"
    settings: tuple[str, ...] = ()


KINDS: dict[ObjectiveKind, Kind] = {
    "power": Kind(settings=("alpha",)),
    "log_ratio": Kind(),
    "clip": Kind(settings=("clip_low", "clip_high")),
    "tanh": Kind(settings=("tau",)),
    "z_score": Kind(),
    "prob_diff": Kind(),
    "sqrt_diff": Kind(),
    "box_cox": Kind(settings=("alpha",)),
    "constant_negative": Kind(settings=("low_probability",)),
    "reverse_kl": Kind(family="exact"),
    "power_exact": Kind(family="exact", settings=("alpha",)),
    "forward_kl": Kind(family="exact"),
    "topk_reverse_kl": Kind(family="exact", settings=("top_k",)),
    "topk_forward_kl": Kind(family="exact", settings=("top_k",)),
}
_OF_SAMPLED = ("reward_normalization", "importance_ratio", "head")
"""Settings that no kind of the exact family uses: it has one head, and weighs no drawn tokens."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What the student is rewarded for."""

    kind: ObjectiveKind = "power"
    """power: p_T^alpha - p_S^alpha (PowerOPD, bounded); log_ratio: log p_T - log p_S (vanilla OPD,
    unbounded); clip and tanh: the log-ratio, bounded after the fact; z_score: the log-ratio minus
    its mean over the batch, by its standard deviation; prob_diff and sqrt_diff: power with alpha 1
    and 0.5; box_cox: power divided by alpha; constant_negative: -1 where p_S is low, without a
    teacher. Over the whole vocabulary at each position, not the drawn token alone: reverse_kl, KL(S
    || T), what log_ratio is on average; power_exact, the same of power; forward_kl, KL(T || S);
    topk_reverse_kl and topk_forward_kl, these of the top_k tokens and of all others as one."""
    alpha: float = 5.0
    """Exponent of power, box_cox and power_exact; larger ignores tokens that both models find
    unlikely."""
    top_k: int = 64
    """Tokens that topk_reverse_kl (the student's most likely ones) and topk_forward_kl (the
    teacher's) tell apart; those tied with the last of them, too."""
    clip_low: float = -1.0
    """Smallest reward of clip."""
    clip_high: float = 1.0
    """Largest reward of clip."""
    tau: float = 5.0
    """tanh is of the log-ratio divided by this."""
    low_probability: float = 0.1
    """constant_negative punishes tokens that the student gives less than this."""
    reward_normalization: Literal["none", "z_score", "sign_max_abs"] = "none"
    """What the global batch's rewards are brought to: z_score, mean 0 and standard deviation 1,
    which changes signs; sign_max_abs, the largest of each sign to 1 and -1. Both take one more
    forward of the student."""
    terminal: Literal["raw", "mask", "cross_eos", "im_end"] = "mask"
    """The final EOS position: raw scores it as is; mask drops it from the loss; cross_eos scores
    the teacher on its own EOS; im_end trains and scores the teacher's EOS in its place."""
    window_first_percent: float = 100.0
    """Only this many per cent of a response's tokens are in the loss, its first ones."""
    window_after_tokens: int = 0
    """This many tokens at the start of a response are not in the loss."""
    loss_normalization: Literal["token_mean", "sequence_mean", "micro_batch_mean"] = "token_mean"
    """token_mean: each token of the batch counts alike; sequence_mean: each response does;
    micro_batch_mean: each micro-batch does, as in the paper's released trainer, so that the result
    depends on micro_batch_size and the layout."""
    importance_ratio: Literal["none", "token", "sequence"] = "none"
    """Weigh each reward by p_S / p_behaviour, of its token or of its whole response: for several
    optimizer steps on a batch (mini_batch_size), or responses that were not drawn from the student
    as it is scored (rollout.temperature, top_p, top_k). sequence takes one more forward."""
    ratio_low: float = 0.0
    """Smaller importance ratios are raised to this."""
    ratio_high: float = 2.0
    """Larger importance ratios are lowered to this."""
    head: Literal["fused", "recompute", "materialized"] = "fused"
    """How the student's LM head is trained: fused visits each token once and keeps a chunk of
    logits; recompute keeps a tile and multiplies a fourth time; materialized keeps all logits."""
    logits_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of both models' logits; bf16 (of bf16 models) is as transformers has it, with about a
    tenth of the reward in rounding noise."""


DECIDING = ("kind", "importance_ratio")
"""The settings in [objective] that decide which others are used."""


def window_end(num_tokens: int, first_percent: float) -> int:
    """Return how many of a response's tokens window_first_percent leaves, rounded up.

    The percentage is taken as it was written: 4.4 % of 750 are 33, not the 34 of binary fractions.
    """
    return math.ceil(Fraction(repr(first_percent)) * num_tokens / 100)


def unused_settings(objective: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of [objective] that have no effect beside the others, and why.

    objective: values by name; what isn't there has its default. A reason reads "objective.kind =
    'log_ratio' has none: power and box_cox do".
    """
    kind = objective.get("kind", "power")
    if kind not in KINDS:
        return {}
    users: dict[str, list[str]] = {}
    for name, known in KINDS.items():
        for setting in known.settings:
            users.setdefault(setting, []).append(name)
    unused = {
        setting: f"objective.kind = {kind!r} has none: {_enumerated(names)} "
        + ("do" if len(names) > 1 else "does")
        for setting, names in users.items()
        if kind not in names
    }
    if KINDS[kind].family == "exact":
        why = f"objective.kind = {kind!r} is over the whole vocabulary, not of drawn tokens"
        unused |= dict.fromkeys((*_OF_SAMPLED, "ratio_low", "ratio_high"), why)
        return unused
    if kind == "z_score":
        unused["reward_normalization"] = "objective.kind = 'z_score' is normalized in itself"
    if kind == "constant_negative" and objective.get("reward_normalization") != "z_score":
        why = "objective.kind = 'constant_negative' has rewards of -1 and 0 alone"
        unused["reward_normalization"] = why
    if objective.get("importance_ratio", "none") == "none":
        for setting in ("ratio_low", "ratio_high"):
            unused[setting] = "objective.importance_ratio = 'none' has no bounds"
    return unused


def _enumerated(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
