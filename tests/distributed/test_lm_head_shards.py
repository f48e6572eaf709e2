"""The LM head over a vocabulary that is cut over 1 to 8 ranks, against fp64 autograd.

Shapes: N tokens, H hidden, V vocabulary, Vp columns of it on a rank (padding included).
"""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.lm_head_cases import HEADS, Case, error, exact, leaves, loss_of, plain, power
from support.rank_pool import RankError, RankPool
from torch import Tensor

from poweropd_megatron.config.schema import ObjectiveConfig
from poweropd_megatron.objectives.rewards import build_reward
from poweropd_megatron.ops import lm_head_tiles
from poweropd_megatron.ops.lm_head import score
from poweropd_megatron.ops.lm_head_tiles import LMHead

ROUNDING = 5e-6
"""Norm of the difference over the norm of what fp32 rounds; a third of it is seen."""
TP_SIZES = (1, 2, 4, 8)
REWARD = ObjectiveConfig(kind="power", alpha=1.0)
BF16 = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class ShardedCase:
    """A case whose padded_size is cut into equal shares."""

    case: Case
    tiny_tiles: bool = True


CASES = {
    "padded": ShardedCase(case=Case(vocab_size=1201, padded_size=1208, with_ignored=True)),
    "one-tile": ShardedCase(case=Case(vocab_size=1201, padded_size=1208), tiny_tiles=False),
    "empty-shards": ShardedCase(case=Case(vocab_size=9, padded_size=64, with_ignored=True)),
    "one-token": ShardedCase(case=Case(vocab_size=1, padded_size=8, num_tokens=5)),
    "no-tokens": ShardedCase(case=Case(num_tokens=0, padded_size=304)),
    "bf16": ShardedCase(case=Case(dtype=BF16, padded_size=304, with_ignored=True)),
    "bf16-logits": ShardedCase(case=Case(dtype=BF16, logits_dtype=BF16, padded_size=304)),
}


class Result(NamedTuple):
    """What a rank has: all tokens' values, its share of the hidden states' gradient, its rows of
    the weight's.
    """

    loss: Tensor
    logp_N: Tensor
    entropy_N: Tensor
    hidden_grad_NH: Tensor
    weight_grad_VpH: Tensor
    scored_N: Tensor


def compute_on_ranks(cases: list[ShardedCase]) -> dict[str, list[Result]]:
    """Return this rank's results of the cases with each head."""
    return {kind: [compute(kind, sharded) for sharded in cases] for kind in HEADS}


def compute(kind: str, sharded: ShardedCase) -> Result:
    """Return this rank's result of a case, from its own columns; the gradient is in main_grad."""
    case = sharded.case
    columns = case.padded_size // dist.get_world_size()
    chunk_bytes = {"cpu": 20 * columns * case.logits_dtype.itemsize}
    with pytest.MonkeyPatch.context() as patch:
        if sharded.tiny_tiles:
            patch.setattr(lm_head_tiles, "TILE_ROWS", {"cpu": 16})
            patch.setattr(lm_head_tiles, "TILE_BYTES", {"cpu": 4 * 16 * 128})
            patch.setattr(lm_head_tiles, "CHUNK_BYTES", chunk_bytes)
        return compute_from_columns(kind, case, columns)


def compute_from_columns(kind: str, case: Case, columns: int) -> Result:
    batch = case.batch()
    first = dist.get_rank() * columns
    hidden_NH, _ = leaves(batch)
    weight = torch.nn.Parameter(batch.weight_VpH[first : first + columns].clone())
    weight.main_grad = torch.zeros(weight.shape)
    head = LMHead(
        weight_VpH=weight,
        vocab_size=case.vocab_size,
        tp_group=dist.group.WORLD,
        logits_dtype=case.logits_dtype,
    )
    loss, logp_N, entropy_N = loss_of(kind, hidden_NH, head, batch, build_reward(REWARD))
    loss.backward()
    assert weight.grad is None
    scored_N = score(hidden_NH, head, batch.targets_N).logp_N
    return Result(loss.detach(), logp_N, entropy_N, hidden_NH.grad, weight.main_grad, scored_N)


@pytest.fixture(scope="module", params=TP_SIZES, ids=lambda size: f"TP{size}")
def results(
    request: pytest.FixtureRequest, ranks: RankPool
) -> dict[tuple[str, str], tuple[Result, ...]]:
    """Return the results of every rank for each head and case."""
    by_rank = ranks.run(compute_on_ranks, list(CASES.values()), world_size=request.param)
    return {
        (kind, name): tuple(of_rank[kind][number] for of_rank in by_rank)
        for kind in HEADS
        for number, name in enumerate(CASES)
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", HEADS)
def test_shards_give_the_values_and_gradients_of_fp64_autograd(
    kind: str, name: str, results: dict[tuple[str, str], tuple[Result, ...]]
) -> None:
    """In bf16 at most twice the error of plain torch on the whole vocabulary."""
    case, found = CASES[name].case, results[kind, name]
    batch = case.batch()
    truth = exact(case, batch)
    whole = found[0]._replace(
        hidden_grad_NH=sum(result.hidden_grad_NH.double() for result in found),
        weight_grad_VpH=torch.cat([result.weight_grad_VpH for result in found]),
    )
    torchs = plain(case, batch, power, case.dtype, case.logits_dtype)
    for quantity in truth._fields:
        expected = getattr(truth, quantity)
        allowed = ROUNDING
        if case.dtype == BF16:
            allowed += 2 * error(getattr(torchs, quantity), expected)
        assert error(getattr(whole, quantity), expected) <= allowed, quantity
    assert error(whole.scored_N, truth.logp_N) <= (1e-2 if case.logits_dtype == BF16 else ROUNDING)
    assert not whole.weight_grad_VpH[case.vocab_size :].any()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", HEADS)
def test_all_ranks_have_the_same_bits(
    kind: str, name: str, results: dict[tuple[str, str], tuple[Result, ...]]
) -> None:
    first, *others = results[kind, name]
    for other in others:
        for quantity in ("loss", "logp_N", "entropy_N", "scored_N"):
            assert torch.equal(getattr(other, quantity), getattr(first, quantity))


def test_a_vocabulary_that_the_shards_can_not_hold_is_refused(ranks: RankPool) -> None:
    message = "vocab_size must be 1 to 8, which is 4 columns on each of 2 ranks, got 9"
    with pytest.raises(RankError, match=message):
        ranks.run(score_too_large_a_vocabulary, world_size=2)


def score_too_large_a_vocabulary() -> None:
    head = LMHead(weight_VpH=torch.zeros(4, 3), vocab_size=9, tp_group=dist.group.WORLD)
    score(torch.zeros(1, 3), head, torch.tensor([8]))
