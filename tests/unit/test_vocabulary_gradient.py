"""Objectives over the whole vocabulary on given logits: extremes, properties, sampled gradients.

With an identity for a head the hidden states are the logits, and their gradient that of the logits.
Shapes: N tokens, V vocabulary, M samples.
"""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.vocabulary_cases import LOSSES, OBJECTIVES, TOP_K
from torch import Tensor

from poweropd_megatron.objectives.rewards import Reward
from poweropd_megatron.objectives.sampled.log_ratio import log_ratio_reward
from poweropd_megatron.objectives.sampled.power import power_reward
from poweropd_megatron.ops import lm_head_tiles
from poweropd_megatron.ops.backends import IGNORED_TARGET
from poweropd_megatron.ops.fused_policy_gradient import fused_policy_gradient
from poweropd_megatron.ops.fused_vocabulary_gradient import (
    VocabularyGradient,
    fused_vocabulary_gradient,
)
from poweropd_megatron.ops.lm_head_tiles import LMHead
from poweropd_megatron.ops.vocabulary_objectives import (
    PowerExact,
    ReverseKL,
    TopKForwardKL,
    TopKReverseKL,
    VocabularyObjective,
    power_rewards,
)
from poweropd_megatron.parallel.layout import Layout

V = 12
LOGP = st.floats(-100, 0, width=32)


def identity_head(layout: Layout, size: int = V) -> LMHead:
    return LMHead(weight_VpH=torch.eye(size), vocab_size=size, tp_group=layout.groups.tp)


def of_logits(
    student_NV: Tensor,
    teacher_NV: Tensor,
    objective: VocabularyObjective,
    layout: Layout,
    targets_N: Tensor | None = None,
) -> tuple[VocabularyGradient, Tensor]:
    """Return the objective of these logits, and its gradient over the student's."""
    head = identity_head(layout, student_NV.shape[1])
    leaf_NV = student_NV.clone().requires_grad_()
    if targets_N is None:
        targets_N = torch.zeros(len(student_NV), dtype=torch.int64)
    result = fused_vocabulary_gradient(leaf_NV, head, teacher_NV, head, targets_N, objective)
    [gradient_NV] = torch.autograd.grad(result.loss, leaf_NV)
    return result, gradient_NV


def random_logits(num_tokens: int = 4, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, teacher = scale * torch.randn(2, num_tokens, V, generator=generator)
    return student, teacher


def one_hot(floor: float) -> Tensor:
    return torch.full((V,), floor).index_fill(0, torch.tensor(3), 0.0)


SOME, OTHERS = random_logits()
LIKELY_V = torch.arange(V) < TOP_K
LIFTED, SUNK = SOME + torch.where(LIKELY_V, 8.0, 0.0), OTHERS + torch.where(LIKELY_V, 0.0, -150.0)
EXTREMES = {
    "offset of 1000": (SOME + 1000, OTHERS - 1000),
    "all tied": (torch.zeros(2, V), OTHERS[:2]),
    "teacher all tied": (SOME[:2], torch.full((2, V), -7.0)),
    "tied in pairs": (SOME.repeat_interleave(2, 1)[:, :V], OTHERS.round()),
    "one-hot teacher": (SOME, one_hot(-60.0).expand(4, V)),
    "one-hot student": (one_hot(-60.0).expand(4, V), OTHERS),
    "one-hot both": (one_hot(-60.0)[None], one_hot(-60.0).roll(1)[None]),
    "student excludes tokens": (torch.cat([torch.full((4, 6), -1e30), SOME[:, 6:]], 1), OTHERS),
    "teacher's tail underflows": (LIFTED, SUNK),
    "student's tail underflows": (SUNK, LIFTED),
    "both tails underflow": (SUNK, SUNK.flip(0)),
    "equal": (SOME, SOME),
}
"""Logits of student and teacher."""


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_extreme_logits_have_the_loss_and_gradient_of_fp64(
    kind: str, name: str, layout: Layout
) -> None:
    student_NV, teacher_NV = EXTREMES[name]
    if "excludes" in name and "forward" in kind:
        pytest.skip("its fp64 value overflows the tolerance: the loss is 1e30")
    result, gradient_NV = of_logits(student_NV, teacher_NV, OBJECTIVES[kind], layout)
    leaf_NV = student_NV.double().requires_grad_()
    loss_N = LOSSES[kind](leaf_NV.log_softmax(1), teacher_NV.double().log_softmax(1))
    [expected_NV] = torch.autograd.grad(loss_N.sum(), leaf_NV)
    torch.testing.assert_close(result.loss_N.double(), loss_N.detach(), rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(gradient_NV.double(), expected_NV, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_student_that_is_the_teacher_has_no_gradient_at_all(kind: str, layout: Layout) -> None:
    for logits_NV in (SOME, SOME + 1000, one_hot(-1e30)[None], torch.zeros(2, V)):
        result, gradient_NV = of_logits(logits_NV, logits_NV, OBJECTIVES[kind], layout)
        assert not gradient_NV.any()
        assert not result.reverse_kl_N.any()


def test_the_gradient_norm_overflows_where_the_teacher_excludes_a_token(layout: Layout) -> None:
    """So that the run ends: see train.student."""
    teacher_NV = torch.full((4, V), 3e38)
    teacher_NV[:, 2] = -3e38
    result, gradient_NV = of_logits(SOME, teacher_NV, ReverseKL(), layout)
    assert (result.loss_N > 1e30).all()
    assert gradient_NV.norm() == torch.inf


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_nan_of_ignored_rows_reaches_nothing(kind: str, layout: Layout) -> None:
    targets_N = torch.tensor([0, -100, 1, 2])
    poisoned, clean = OTHERS.clone(), OTHERS.clone()
    poisoned[1] = torch.nan
    found, gradient_NV = of_logits(SOME, poisoned, OBJECTIVES[kind], layout, targets_N)
    expected, expected_NV = of_logits(SOME, clean, OBJECTIVES[kind], layout, targets_N)
    assert torch.equal(gradient_NV, expected_NV)
    assert not gradient_NV[1].any()
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_nan_of_a_live_row_stays(kind: str, layout: Layout) -> None:
    poisoned = OTHERS.clone()
    poisoned[1, 4] = torch.nan
    result, _ = of_logits(SOME, poisoned, OBJECTIVES[kind], layout)
    assert result.loss_N.isnan().tolist() == [False, True, False, False]


@given(
    logp=st.lists(st.tuples(LOGP, LOGP), min_size=1, max_size=40),
    alpha=st.floats(0.01, 500),
)
def test_its_rewards_are_those_of_sampled_tokens(
    logp: list[tuple[float, float]], alpha: float
) -> None:
    teacher, student = torch.tensor(logp).unbind(1)
    found = power_rewards(teacher, student, alpha=alpha)
    torch.testing.assert_close(
        found, power_reward(teacher, student, alpha=alpha), rtol=2e-6, atol=0
    )
    assert (found.abs() <= 1).all()
    assert (found * (teacher - student) >= 0).all()


@pytest.mark.parametrize("whole", [TopKReverseKL(V), TopKForwardKL(V), TopKReverseKL(3 * V)])
def test_k_of_the_whole_vocabulary_is_the_kl_itself(
    whole: TopKReverseKL | TopKForwardKL, layout: Layout
) -> None:
    kind = "reverse_kl" if isinstance(whole, TopKReverseKL) else "forward_kl"
    expected, expected_NV = of_logits(SOME, OTHERS, OBJECTIVES[kind], layout)
    found, found_NV = of_logits(SOME, OTHERS, whole, layout)
    torch.testing.assert_close(found.loss_N, expected.loss_N)
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bucketed", [TopKReverseKL, TopKForwardKL])
def test_a_larger_k_tells_more_of_the_kl(
    bucketed: type[TopKReverseKL] | type[TopKForwardKL], layout: Layout
) -> None:
    losses = [
        of_logits(SOME, OTHERS, bucketed(top_k), layout)[0].loss_N for top_k in range(1, V + 1)
    ]
    assert all((more - less).min() > -1e-6 for less, more in pairwise(losses))
    assert losses[-1].mean() > losses[0].mean() + 0.5


@pytest.mark.parametrize(
    ("reward", "exact"),
    [
        *((partial(power_reward, alpha=alpha), PowerExact(alpha)) for alpha in (0.1, 1.0, 5.0)),
        (log_ratio_reward, ReverseKL()),
    ],
    ids=["power 0.1", "power 1", "power 5", "log-ratio, reverse KL"],
)
def test_the_mean_of_sampled_gradients_comes_to_the_exact_one(
    reward: Reward, exact: VocabularyObjective, layout: Layout
) -> None:
    """Within 5 standard errors of each of 48 components, which are far smaller than these."""
    size = 6
    student_NV, teacher_NV = (logits[:, :size] for logits in random_logits(8, scale=1.2))
    _, exact_NV = of_logits(student_NV, teacher_NV, exact, layout)
    num_samples = 40_000
    generator = torch.Generator().manual_seed(1)
    tokens_NM = torch.multinomial(
        student_NV.softmax(1), num_samples, replacement=True, generator=generator
    )
    teacher_logp_NM = teacher_NV.log_softmax(1).gather(1, tokens_NM)
    hidden = student_NV.repeat_interleave(num_samples, 0).requires_grad_()
    loss = fused_policy_gradient(
        hidden, identity_head(layout, size), tokens_NM.flatten(), teacher_logp_NM.flatten(), reward
    ).loss
    [gradient] = torch.autograd.grad(loss, hidden)
    sampled_NMV = gradient.view(len(student_NV), num_samples, size)
    standard_error_NV = sampled_NMV.std(1) / num_samples**0.5
    deviation_NV = (sampled_NMV.mean(1) - exact_NV) / standard_error_NV
    assert deviation_NV.abs().max() < 5
    assert exact_NV.abs().mean() > 10 * standard_error_NV.mean()


def test_heads_that_are_cut_differently_are_refused(layout: Layout) -> None:
    group, targets_N = layout.groups.tp, torch.zeros(2, dtype=torch.int64)
    heads = [
        LMHead(weight_VpH=torch.zeros(size, 3), vocab_size=vocab_size, tp_group=group)
        for size, vocab_size in ((5, 5), (5, 4), (6, 5))
    ]
    hidden = torch.zeros(2, 3)
    for other, message in (
        (heads[1], "vocab_size is 5 of the student's head, 4 of the teacher's"),
        (heads[2], "weight_VpH has 5 columns of the student's head, 6 of the teacher's"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_vocabulary_gradient(hidden, heads[0], hidden, other, targets_N, ReverseKL())


@pytest.mark.parametrize("is_student_bf16", [True, False])
def test_models_of_two_types_are_cut_into_the_same_chunks(
    is_student_bf16: bool, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bf16 weight by itself would get longer chunks: 6 rows instead of 5."""
    student_NV, teacher_NV = random_logits(num_tokens=23)
    targets_N = torch.zeros(23, dtype=torch.int64)
    types = [torch.bfloat16, torch.float32]
    if not is_student_bf16:
        types.reverse()
    student_NV, teacher_NV = (x.to(t) for x, t in zip((student_NV, teacher_NV), types, strict=True))
    whole, _ = of_logits(student_NV.float(), teacher_NV.float(), PowerExact(2.0), layout)
    monkeypatch.setattr(lm_head_tiles, "CHUNK_BYTES", {"cpu": 5 * 2 * 4 * V})
    heads = [
        LMHead(weight_VpH=torch.eye(V, dtype=t), vocab_size=V, tp_group=layout.groups.tp)
        for t in types
    ]
    cut = fused_vocabulary_gradient(
        student_NV, heads[0], teacher_NV, heads[1], targets_N, PowerExact(2.0)
    )
    assert torch.equal(cut.loss_N, whole.loss_N)


def test_the_weight_of_an_ignored_token_may_be_anything(layout: Layout) -> None:
    student_NV, teacher_NV = random_logits(num_tokens=3)
    head, leaf_NV = identity_head(layout), student_NV.clone().requires_grad_()
    targets_N = torch.tensor([0, IGNORED_TARGET, 2])
    weight_N = torch.tensor([1.0, torch.nan, 2.0])
    result = fused_vocabulary_gradient(
        leaf_NV, head, teacher_NV, head, targets_N, ReverseKL(), weight_N
    )
    result.loss.backward()
    assert result.loss.isfinite()
    assert leaf_NV.grad is not None
    assert leaf_NV.grad.isfinite().all()
    assert (leaf_NV.grad[1] == 0).all()


@pytest.mark.parametrize("top_k", [0, -1])
@pytest.mark.parametrize("bucketed", [TopKReverseKL, TopKForwardKL])
def test_a_k_below_1_is_refused(
    bucketed: type[TopKReverseKL] | type[TopKForwardKL], top_k: int, layout: Layout
) -> None:
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {top_k}"):
        of_logits(SOME, OTHERS, bucketed(top_k), layout)
