"""The fused, recomputing and materializing LM head on one rank, against fp64 autograd."""

from collections.abc import Callable

import pytest
import torch
from support.lm_head_cases import (
    HEADS,
    IGNORED,
    Batch,
    Case,
    Outcome,
    Reward,
    error,
    exact,
    leaves,
    loss_of,
    plain,
    power,
)
from torch import Tensor

from poweropd_megatron.config.schema import ObjectiveConfig
from poweropd_megatron.objectives.rewards import build_reward
from poweropd_megatron.ops import lm_head_tiles
from poweropd_megatron.ops.lm_head import materialized_logprob, recomputed_logprob, score
from poweropd_megatron.ops.lm_head_tiles import LMHead
from poweropd_megatron.ops.logprob import TokenLogprobs
from poweropd_megatron.parallel.layout import Layout

ROUNDING = 5e-6
"""Norm of the difference over the norm of what fp32 rounds; a third of it is seen."""
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]

Train = Callable[..., Outcome]


@pytest.fixture(params=["default tiles", "tiny tiles"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Visit the logits at once, or in many tiles of which the last are smaller."""
    if request.param == "tiny tiles":
        monkeypatch.setattr(lm_head_tiles, "TILE_ROWS", {"cpu": 7})
        monkeypatch.setattr(lm_head_tiles, "TILE_BYTES", {"cpu": 4 * 7 * 128})
        monkeypatch.setattr(lm_head_tiles, "CHUNK_BYTES", {"cpu": 4 * 311 * 5})


@pytest.fixture
def make_head(layout: Layout) -> Callable[[Case, Tensor], LMHead]:
    def make(case: Case, weight_VpH: Tensor) -> LMHead:
        return LMHead(
            weight_VpH=weight_VpH,
            vocab_size=case.vocab_size,
            tp_group=layout.groups.tp,
            logits_dtype=case.logits_dtype,
        )

    return make


@pytest.fixture
def train(make_head: Callable[[Case, Tensor], LMHead]) -> Train:
    """Return what computes the loss with one of HEADS, and its gradients."""

    def run(kind: str, case: Case, batch: Batch, reward: Reward = power) -> Outcome:
        hidden_NH, weight_VpH = leaves(batch)
        loss, logp_N, entropy_N = loss_of(
            kind, hidden_NH, make_head(case, weight_VpH), batch, reward
        )
        assert not logp_N.requires_grad
        assert not entropy_N.requires_grad
        loss.backward()
        return Outcome(loss.detach(), logp_N, entropy_N, hidden_NH.grad, weight_VpH.grad)

    return run


def errors(actual: Outcome, truth: Outcome) -> dict[str, float]:
    return {name: error(getattr(actual, name), getattr(truth, name)) for name in Outcome._fields}


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("with_ignored", [False, True], ids=["all", "some ignored"])
@pytest.mark.parametrize("num_tokens", [1, 5, 53])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_are_those_of_fp64_autograd(
    train: Train, kind: str, num_tokens: int, with_ignored: bool
) -> None:
    case = Case(num_tokens=num_tokens, with_ignored=with_ignored)
    batch = case.batch()
    found = errors(train(kind, case, batch), exact(case, batch))
    assert max(found.values()) <= ROUNDING, found


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("dtype", "logits_dtype"), DTYPES)
@pytest.mark.parametrize("kind", HEADS)
def test_the_error_is_at_most_twice_that_of_plain_torch_in_the_same_dtypes(
    train: Train, kind: str, dtype: torch.dtype, logits_dtype: torch.dtype
) -> None:
    case = Case(dtype=dtype, logits_dtype=logits_dtype, num_tokens=211)
    batch = case.batch()
    truth = exact(case, batch)
    found = train(kind, case, batch)
    assert found.hidden_grad_NH.dtype == found.weight_grad_VpH.dtype == dtype
    assert found.loss.dtype == found.logp_N.dtype == found.entropy_N.dtype == torch.float32
    ours = errors(found, truth)
    torchs = errors(plain(case, batch, power, dtype, logits_dtype), truth)
    for name in Outcome._fields:
        assert ours[name] <= 2 * torchs[name] + 1e-7, (name, ours, torchs)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_heads_agree_up_to_rounding(train: Train, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, with_ignored=True)
    batch = case.batch()
    fused, recompute, materialized = (train(kind, case, batch) for kind in HEADS)
    rounding = ROUNDING if dtype == torch.float32 else 2e-3
    for other in (recompute, materialized):
        found = errors(fused, other)
        assert max(found.values()) <= rounding, found
        assert found["logp_N"] <= ROUNDING


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("kind", HEADS)
def test_ignored_tokens_and_padding_take_no_part(train: Train, kind: str) -> None:
    case = Case(with_ignored=True)
    batch = case.batch()
    ignored_N = batch.targets_N == IGNORED
    batch.teacher_logp_N[ignored_N] = torch.nan
    found = train(kind, case, batch)
    assert not found.logp_N[ignored_N].any()
    assert not found.entropy_N[ignored_N].any()
    assert not found.hidden_grad_NH[ignored_N].any()
    assert not found.weight_grad_VpH[case.vocab_size :].any()
    assert found.loss.isfinite()


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("logprob", [recomputed_logprob, materialized_logprob])
def test_what_arrives_at_the_log_prob_of_an_ignored_token_goes_nowhere(
    make_head: Callable[[Case, Tensor], LMHead], logprob: Callable[..., TokenLogprobs]
) -> None:
    case = Case(with_ignored=True)
    batch = case.batch()
    reward_N = batch.teacher_logp_N.exp()
    upstream_N = torch.where(batch.targets_N == IGNORED, torch.nan, -reward_N)
    hidden_NH, weight_VpH = leaves(batch)
    logp_N = logprob(hidden_NH, make_head(case, weight_VpH), batch.targets_N).logp_N
    logp_N.backward(upstream_N)
    truth = exact(case, batch, lambda teacher, _student: teacher.exp())
    assert error(hidden_NH.grad, truth.hidden_grad_NH) <= ROUNDING
    assert error(weight_VpH.grad, truth.weight_grad_VpH) <= ROUNDING


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("dtype", "logits_dtype"), DTYPES)
def test_score_gives_the_log_probs_and_entropies_that_are_trained_on(
    train: Train,
    make_head: Callable[[Case, Tensor], LMHead],
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> None:
    case = Case(dtype=dtype, logits_dtype=logits_dtype, with_ignored=True)
    batch = case.batch()
    hidden_NH, weight_VpH = leaves(batch)
    head = make_head(case, weight_VpH)
    scored = score(hidden_NH, head, batch.targets_N, with_entropy=True)
    assert not scored.logp_N.requires_grad
    assert score(hidden_NH, head, batch.targets_N).entropy_N is None
    for kind in HEADS:
        trained = train(kind, case, batch)
        assert error(scored.logp_N, trained.logp_N) <= ROUNDING
        assert error(scored.entropy_N, trained.entropy_N) <= ROUNDING
    if logits_dtype == torch.float32:
        assert error(scored.logp_N, exact(case, batch).logp_N) <= ROUNDING


def exact_reward(objective: ObjectiveConfig) -> Reward:
    """Return the reward's equation, in the dtype of the log-probs."""
    alpha = {"prob_diff": 1.0, "sqrt_diff": 0.5}.get(objective.kind, objective.alpha)

    def reward(teacher: Tensor, student: Tensor) -> Tensor:
        ratio = teacher - student
        match objective.kind:
            case "log_ratio":
                return ratio
            case "clip":
                return ratio.clamp(objective.clip_low, objective.clip_high)
            case "tanh":
                return (ratio / objective.tau).tanh()
            case "box_cox":
                return ((alpha * teacher).exp() - (alpha * student).exp()) / alpha
        return (alpha * teacher).exp() - (alpha * student).exp()

    return reward


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(
    "objective",
    [
        *(ObjectiveConfig(kind="power", alpha=alpha) for alpha in (0.1, 1.0, 5.0)),
        *(ObjectiveConfig(kind="box_cox", alpha=alpha) for alpha in (0.01, 5.0)),
        *(ObjectiveConfig(kind=kind) for kind in ("log_ratio", "prob_diff", "sqrt_diff")),
        ObjectiveConfig(kind="clip", clip_low=-2.0, clip_high=0.5),
        ObjectiveConfig(kind="tanh", tau=2.0),
    ],
    ids=lambda objective: f"{objective.kind}-{objective.alpha}",
)
@pytest.mark.parametrize("kind", HEADS)
def test_every_reward_gives_the_gradient_of_fp64_autograd(
    train: Train, kind: str, objective: ObjectiveConfig
) -> None:
    case = Case(with_ignored=True)
    batch = case.batch()
    truth = exact(case, batch, exact_reward(objective))
    found = errors(train(kind, case, batch, build_reward(objective)), truth)
    assert max(found.values()) <= 2 * ROUNDING, found


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("kind", HEADS)
def test_tokens_without_reward_leave_exactly_no_gradient(train: Train, kind: str) -> None:
    case = Case()
    found = train(kind, case, case.batch(), lambda _teacher, student: torch.zeros_like(student))
    assert found.loss == 0
    assert not found.hidden_grad_NH.any()
    assert not found.weight_grad_VpH.any()
    assert found.logp_N.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HEADS)
def test_a_teacher_that_is_the_student_rewards_exactly_nothing(
    train: Train, kind: str, dtype: torch.dtype
) -> None:
    case = Case(dtype=dtype)
    batch = case.batch()
    own_N = train(kind, case, batch).logp_N
    batch = batch._replace(teacher_logp_N=own_N)
    for objective in (ObjectiveConfig(kind="power", alpha=0.1), ObjectiveConfig(kind="log_ratio")):
        found = train(kind, case, batch, build_reward(objective))
        assert found.loss == 0
        assert not found.hidden_grad_NH.any()
        assert not found.weight_grad_VpH.any()


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("dtype", "logits_dtype"), DTYPES)
@pytest.mark.parametrize("kind", HEADS)
def test_no_tokens_give_a_loss_and_gradients_of_zero(
    train: Train, kind: str, dtype: torch.dtype, logits_dtype: torch.dtype
) -> None:
    case = Case(num_tokens=0, dtype=dtype, logits_dtype=logits_dtype)
    batch = case.batch()
    found = train(kind, case, batch)
    assert found.loss == 0
    assert found.logp_N.shape == found.entropy_N.shape == (0,)
    assert found.hidden_grad_NH.shape == batch.hidden_NH.shape
    assert torch.equal(found.weight_grad_VpH, torch.zeros_like(batch.weight_VpH))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("kind", HEADS)
def test_a_nan_reaches_the_log_prob_and_the_gradient_of_its_token(train: Train, kind: str) -> None:
    case = Case()
    batch = case.batch()
    batch.hidden_NH[4, 0] = torch.nan
    found = train(kind, case, batch)
    assert found.logp_N.isnan().nonzero().tolist() == [[4]]
    assert found.hidden_grad_NH.isnan().any(dim=1).nonzero().tolist() == [[4]]
    assert found.weight_grad_VpH[: case.vocab_size].isnan().all()
    assert found.loss.isnan()


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("dtype", "logits_dtype"), DTYPES)
@pytest.mark.parametrize("kind", HEADS)
def test_plain_torch_rows_give_the_same_up_to_rounding(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> None:
    case = Case(dtype=dtype, logits_dtype=logits_dtype, with_ignored=True)
    batch, reward = case.batch(), build_reward(ObjectiveConfig(kind="power", alpha=1.0))
    compiled = train(kind, case, batch, reward)
    monkeypatch.setenv("POWEROPD_OPS", "torch")
    found = errors(train(kind, case, batch, reward), compiled)
    gradients = (found.pop("hidden_grad_NH"), found.pop("weight_grad_VpH"))
    assert max(found.values()) <= ROUNDING, found
    assert max(gradients) <= (ROUNDING if dtype == torch.float32 else 4e-3)
