"""The output processors pick the chosen positions' hidden states and the head that is set.

Shapes: S positions, B sequences, N chosen tokens, H hidden, V vocabulary.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.lm_head_cases import HEADS, error, power
from torch import Tensor

from poweropd_megatron.models import scoring
from poweropd_megatron.models.scoring import (
    ChosenTokens,
    RewardedTokens,
    policy_gradient_of_chosen,
    score_chosen,
)
from poweropd_megatron.parallel.layout import Layout

S, B, H, V = 7, 4, 16, 30
CONFIG = SimpleNamespace(sequence_parallel=False)
MAKERS = {
    "fused": "fused_policy_gradient",
    "recompute": "recomputed_logprob",
    "materialized": "materialized_logprob",
}


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor]:
    """Return hidden states [S, B, H] and a weight [V, H] that take gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden_SBH = torch.randn(S, B, H, generator=generator)
    weight_VH = torch.randn(V, H, generator=generator)
    return hidden_SBH.requires_grad_(), weight_VH.requires_grad_()


@pytest.fixture
def chosen(layout: Layout) -> ChosenTokens:
    """Return ragged rows of chosen positions: the first and last possible, gaps, a row of none."""
    is_chosen_BS = torch.zeros(B, S, dtype=torch.bool)
    is_chosen_BS[0] = True
    is_chosen_BS[1, [0, 3]] = True
    is_chosen_BS[3, S - 1] = True
    labels_BS = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(1))
    return ChosenTokens(
        is_chosen_BS=is_chosen_BS,
        labels_BS=labels_BS,
        vocab_size=V,
        tp_group=layout.groups.tp,
        logits_dtype=torch.float32,
    )


def rewarded(chosen: ChosenTokens, head: Any) -> RewardedTokens:
    teacher_logp_N = -torch.linspace(0.1, 5, int(chosen.is_chosen_BS.sum()))
    return RewardedTokens(chosen=chosen, teacher_logp_N=teacher_logp_N, reward=power, head=head)


def exact_logp(hidden_SBH: Tensor, weight_VH: Tensor, chosen: ChosenTokens) -> Tensor:
    """Return log p of each chosen token at the position that predicts it, row by row, in fp64."""
    logp_SBV = (hidden_SBH @ weight_VH.T).log_softmax(dim=2)
    return torch.stack(
        [
            logp_SBV[position, row, chosen.labels_BS[row, position]]
            for row, position in chosen.is_chosen_BS.nonzero().tolist()
        ]
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_the_chosen_tokens_are_trained_on_as_in_fp64_and_no_others(
    head: str, tied: bool, tensors: tuple[Tensor, Tensor], chosen: ChosenTokens
) -> None:
    """Tied embeddings come as output_weight, and the layer then has none."""
    hidden_SBH, weight_VH = tensors
    context = rewarded(chosen, head)
    arguments: dict[str, Any] = {
        "hidden_states": hidden_SBH,
        "output_layer": SimpleNamespace(weight=None if tied else weight_VH),
        "output_weight": weight_VH if tied else None,
        "config": CONFIG,
    }
    found = policy_gradient_of_chosen(**arguments, context=context)
    found.loss.backward()
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    logp_N = exact_logp(*doubles, chosen)
    loss = -(power(context.teacher_logp_N.double(), logp_N) * logp_N).sum()
    loss.backward()
    assert error(found.loss.detach(), loss.detach()) <= 5e-6
    assert error(found.logp_N, logp_N.detach()) <= 5e-6
    assert error(hidden_SBH.grad, doubles[0].grad) <= 5e-6
    assert error(weight_VH.grad, doubles[1].grad) <= 5e-6
    assert not hidden_SBH.grad[:, 2].any()
    scored_N = score_chosen(**arguments, context=chosen)
    assert error(scored_N, logp_N.detach()) <= 5e-6


@pytest.mark.parametrize("head", HEADS)
def test_the_setting_chooses_the_head(
    head: str,
    tensors: tuple[Tensor, Tensor],
    chosen: ChosenTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The results are the same; time and memory are not."""

    def fail(*_: Any) -> None:
        raise AssertionError("another head was used")

    for other, name in MAKERS.items():
        if other != head:
            monkeypatch.setattr(scoring, name, fail)
    hidden_SBH, weight_VH = tensors
    policy_gradient_of_chosen(
        hidden_states=hidden_SBH,
        output_layer=SimpleNamespace(weight=weight_VH),
        output_weight=None,
        config=CONFIG,
        context=rewarded(chosen, head),
    )
