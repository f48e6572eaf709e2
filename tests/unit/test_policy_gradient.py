"""The expected gradient of the sampled loss, by enumerating every sequence of a tiny language.

The student is a table: a first token from one softmax, a second from a softmax for each first one.
Shapes: C contexts (0 is the start, 1 + v follows token v), V vocabulary.
"""

import itertools

import pytest
import torch
from torch import Tensor

from poweropd_megatron.config.schema import ObjectiveConfig
from poweropd_megatron.objectives.loss import policy_gradient_loss
from poweropd_megatron.objectives.rewards import build_reward
from poweropd_megatron.ops.logprob import vocab_parallel_logprob
from poweropd_megatron.parallel.layout import Layout

V = 5
OBJECTIVES = [
    ObjectiveConfig(kind="power", alpha=0.1),
    ObjectiveConfig(kind="power", alpha=1.0),
    ObjectiveConfig(kind="power", alpha=5.0),
    ObjectiveConfig(kind="log_ratio"),
]


@pytest.fixture
def tables() -> tuple[Tensor, Tensor]:
    """Return the logits of student and teacher, [C, V] each, fp32."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 1.5 * torch.randn(2, 1 + V, V, generator=generator)
    return student, teacher


def expected_sampled_gradient(
    student_CV: Tensor, teacher_CV: Tensor, objective: ObjectiveConfig, layout: Layout
) -> Tensor:
    """Return the loss's gradient, averaged over all V * V sequences by their probability."""
    reward = build_reward(objective)
    probs_CV = student_CV.double().softmax(dim=1)
    expected_CV = torch.zeros(1 + V, V, dtype=torch.float64)
    for first, second in itertools.product(range(V), repeat=2):
        contexts, tokens = torch.tensor([0, 1 + first]), torch.tensor([first, second])
        table_CV = student_CV.clone().requires_grad_()
        student_logp, teacher_logp = (
            vocab_parallel_logprob(
                table[contexts], tokens, vocab_size=V, tp_group=layout.groups.tp
            ).logp_N
            for table in (table_CV, teacher_CV)
        )
        loss = policy_gradient_loss(student_logp, reward(teacher_logp, student_logp))
        [gradient_CV] = torch.autograd.grad(loss, table_CV)
        expected_CV += probs_CV[0, first] * probs_CV[1 + first, second] * gradient_CV.double()
    return expected_CV


def reach(student_CV: Tensor) -> Tensor:
    """Return the probability of coming to each context, [C, 1]."""
    first = student_CV[0].double().softmax(dim=0)
    return torch.cat([torch.ones(1, dtype=torch.float64), first])[:, None]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.kind}-{o.alpha}")
def test_the_expected_gradient_is_the_exact_one_at_every_context(
    tables: tuple[Tensor, Tensor], objective: ObjectiveConfig, layout: Layout
) -> None:
    """- reach(c) sum_v q_v r(p_v, q_v) grad log q_v, with grad log q_v = onehot(v) - q."""
    q_CV, p_CV = (table.double().softmax(dim=1) for table in tables)
    reward_CV = (
        p_CV.log() - q_CV.log()
        if objective.kind == "log_ratio"
        else p_CV**objective.alpha - q_CV**objective.alpha
    )
    weight_CV = q_CV * reward_CV
    exact_CV = -reach(tables[0]) * (weight_CV - q_CV * weight_CV.sum(dim=1, keepdim=True))
    sampled_CV = expected_sampled_gradient(*tables, objective, layout)
    torch.testing.assert_close(sampled_CV, exact_CV, rtol=0, atol=1e-6)
    assert exact_CV.abs().max() > 0.01


def test_the_log_ratio_gradient_is_that_of_the_reverse_kl_of_each_token(
    tables: tuple[Tensor, Tensor], layout: Layout
) -> None:
    table_CV = tables[0].double().requires_grad_()
    q_CV, p_CV = table_CV.softmax(dim=1), tables[1].double().softmax(dim=1)
    kl_C1 = (q_CV * (q_CV.log() - p_CV.log())).sum(dim=1, keepdim=True)
    [kl_gradient_CV] = torch.autograd.grad((reach(tables[0]) * kl_C1).sum(), table_CV)
    sampled_CV = expected_sampled_gradient(*tables, ObjectiveConfig(kind="log_ratio"), layout)
    torch.testing.assert_close(sampled_CV, kl_gradient_CV, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.kind}-{o.alpha}")
def test_a_step_against_the_gradient_brings_the_student_closer_to_the_teacher(
    tables: tuple[Tensor, Tensor], objective: ObjectiveConfig, layout: Layout
) -> None:
    student_CV, teacher_CV = tables

    def kl(table_CV: Tensor) -> float:
        q, p = table_CV.double().log_softmax(dim=1), teacher_CV.double().log_softmax(dim=1)
        return (reach(table_CV) * q.exp() * (q - p)).sum().item()

    gradient_CV = expected_sampled_gradient(student_CV, teacher_CV, objective, layout)
    assert kl(student_CV - 0.1 * gradient_CV.float()) < kl(student_CV)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.kind}-{o.alpha}")
def test_a_student_that_is_the_teacher_has_no_gradient(
    tables: tuple[Tensor, Tensor], objective: ObjectiveConfig, layout: Layout
) -> None:
    student_CV, _ = tables
    assert not expected_sampled_gradient(student_CV, student_CV, objective, layout).any()
