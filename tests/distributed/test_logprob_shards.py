"""Log-probs over a vocabulary that is cut over 2, 4 and 8 ranks, against dense fp64.

Shapes: N tokens, V vocabulary, Vp columns of it on a rank (padding included).
"""

import os
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankError, RankPool
from torch import Tensor

from poweropd_megatron.ops.backends import OVERRIDE, compiled
from poweropd_megatron.ops.logprob import vocab_parallel_logprob


@dataclass(frozen=True, kw_only=True)
class Case:
    """A vocabulary over some ranks; targets are every token of it, each `repeats` times."""

    vocab_size: int
    tp_size: int
    repeats: int = 2
    dtype: torch.dtype = torch.float32
    magnitude: float = 3.0
    padding: float = 1e30

    @property
    def columns(self) -> int:
        """Return Vp: the vocabulary shared out evenly, rounded up."""
        return -(-self.vocab_size // self.tp_size)

    def logits_NV(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.vocab_size)
        shape = (self.repeats * self.vocab_size, self.columns * self.tp_size)
        logits_NV = self.magnitude * torch.randn(shape, generator=generator)
        logits_NV[:, self.vocab_size :] = self.padding
        return logits_NV.to(self.dtype)

    def targets_N(self) -> Tensor:
        return torch.arange(self.vocab_size).repeat(self.repeats)

    def upstream_N(self) -> Tensor:
        """Return the gradient that arrives at the log-probs, 0 for one of them."""
        upstream_N = torch.linspace(-1, 2, self.repeats * self.vocab_size)
        upstream_N[1:2] = 0
        return upstream_N


CASES = {
    "even-TP2": Case(vocab_size=24, tp_size=2),
    "even-TP4": Case(vocab_size=24, tp_size=4),
    "padded-TP2": Case(vocab_size=37, tp_size=2),
    "padded-TP4": Case(vocab_size=37, tp_size=4),
    "infinite-padding": Case(vocab_size=37, tp_size=4, padding=torch.inf),
    "nan-padding": Case(vocab_size=37, tp_size=4, padding=torch.nan),
    "empty-shard": Case(vocab_size=9, tp_size=4),
    "two-empty-shards": Case(vocab_size=5, tp_size=4),
    "fewer-tokens-than-ranks": Case(vocab_size=3, tp_size=4),
    "one-token": Case(vocab_size=1, tp_size=2),
    "no-rows": Case(vocab_size=9, tp_size=4, repeats=0),
    "large-logits": Case(vocab_size=37, tp_size=4, magnitude=1e4),
    "bf16-TP2": Case(vocab_size=37, tp_size=2, dtype=torch.bfloat16),
    "bf16-TP4": Case(vocab_size=37, tp_size=4, dtype=torch.bfloat16),
    "padded-TP8": Case(vocab_size=37, tp_size=8),
    "bf16-TP8": Case(vocab_size=37, tp_size=8, dtype=torch.bfloat16),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Values, and the gradient of this rank's columns or of all."""

    logp_N: Tensor
    entropy_N: Tensor
    gradient: Tensor


def compute_on_ranks(cases: list[Case], back_end: str) -> list[Result]:
    """Return this rank's results, each from its own columns."""
    os.environ[OVERRIDE] = back_end
    results = []
    for case in cases:
        start = dist.get_rank() * case.columns
        logits_NVp = case.logits_NV()[:, start : start + case.columns].clone().requires_grad_()
        logp_N, entropy_N = vocab_parallel_logprob(
            logits_NVp, case.targets_N(), vocab_size=case.vocab_size, tp_group=dist.group.WORLD
        )
        logp_N.backward(case.upstream_N())
        results.append(
            Result(logp_N=logp_N.detach(), entropy_N=entropy_N, gradient=logits_NVp.grad)
        )
    return results


def compute_dense(case: Case, dtype: torch.dtype = torch.float64) -> Result:
    """Return what torch's log_softmax gives on the whole vocabulary, without the padding."""
    logits_NV = case.logits_NV()[:, : case.vocab_size].to(dtype).requires_grad_()
    logp_NV = logits_NV.log_softmax(dim=1)
    logp_N = logp_NV.gather(1, case.targets_N()[:, None])[:, 0]
    logp_N.backward(case.upstream_N().to(dtype))
    entropy_N = -torch.where(logp_NV.exp() > 0, logp_NV.exp() * logp_NV, 0.0).sum(dim=1)
    return Result(logp_N=logp_N.detach(), entropy_N=entropy_N.detach(), gradient=logits_NV.grad)


@pytest.fixture(scope="module", params=["", "torch"], ids=["compiled", "torch"])
def results(request: pytest.FixtureRequest, ranks: RankPool) -> dict[str, list[Result]]:
    """Return the results of every rank for each case, with the compiled kernels and without."""
    if not request.param and isinstance(compiled("cpu"), str):
        pytest.skip("no compiled module")
    results: dict[str, list[Result]] = {}
    for tp_size in (2, 4, 8):
        names = [name for name, case in CASES.items() if case.tp_size == tp_size]
        cases = [CASES[name] for name in names]
        by_rank = ranks.run(compute_on_ranks, cases, request.param, world_size=tp_size)
        results |= dict(zip(names, zip(*by_rank, strict=True), strict=True))
    return results


@pytest.mark.parametrize("name", CASES)
def test_shards_give_the_values_of_dense_fp64(name: str, results: dict[str, list[Result]]) -> None:
    expected = compute_dense(CASES[name])
    scale = max(CASES[name].magnitude, 1.0)
    for result in results[name]:
        assert result.logp_N.dtype == result.entropy_N.dtype == torch.float32
        for actual, wanted in (
            (result.logp_N, expected.logp_N),
            (result.entropy_N, expected.entropy_N),
        ):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("name", CASES)
def test_shards_give_the_gradient_of_dense_fp64(
    name: str, results: dict[str, list[Result]]
) -> None:
    """The error is at most twice that of torch's log_softmax in the logits' dtype."""
    case = CASES[name]
    whole = torch.cat([result.gradient for result in results[name]], dim=1)
    assert whole.dtype == case.dtype
    expected = compute_dense(case).gradient
    plain = compute_dense(case, case.dtype).gradient.double()
    error = (whole[:, : case.vocab_size].double() - expected).norm()
    assert error <= 2 * (plain - expected).norm() + 1e-7


@pytest.mark.parametrize("name", CASES)
def test_shards_agree_exactly_and_padding_gets_no_gradient(
    name: str, results: dict[str, list[Result]]
) -> None:
    case = CASES[name]
    first = results[name][0]
    for result in results[name]:
        assert torch.equal(result.logp_N, first.logp_N)
        assert torch.equal(result.entropy_N, first.entropy_N)
    whole = torch.cat([result.gradient for result in results[name]], dim=1)
    assert (whole[:, case.vocab_size :] == 0).all()


def test_a_target_outside_the_vocabulary_is_refused_even_where_there_is_padding(
    ranks: RankPool,
) -> None:
    with pytest.raises(
        RankError, match=r"targets_N must lie in \[0, 9\) or be -100, got 9 in row 0"
    ):
        ranks.run(score_a_padding_column, world_size=2)


def score_a_padding_column() -> None:
    vocab_parallel_logprob(
        torch.zeros(1, 5), torch.tensor([9]), vocab_size=9, tp_group=dist.group.WORLD
    )
