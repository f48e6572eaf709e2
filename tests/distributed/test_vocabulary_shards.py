"""Objectives over a vocabulary that is cut over 1, 2 and 4 ranks, against dense fp64 autograd.

Shapes: N tokens, H hidden, V vocabulary, Vp columns of it on a rank (padding included).
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from support.lm_head_cases import Case, error, leaves
from support.rank_pool import RankPool
from support.vocabulary_cases import OBJECTIVES, Outcome, dense, teacher_of

from poweropd_megatron.ops import fused_vocabulary_gradient as op
from poweropd_megatron.ops import lm_head_tiles
from poweropd_megatron.ops.lm_head_tiles import LMHead

ROUNDING = 5e-6
"""Norm of the difference over the norm of what fp32 rounds."""
TP_SIZES = (1, 2, 4)
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
    "fewer-than-k": ShardedCase(case=Case(vocab_size=3, padded_size=8)),
    "no-tokens": ShardedCase(case=Case(num_tokens=0, padded_size=304)),
    "bf16": ShardedCase(case=Case(dtype=BF16, padded_size=304, with_ignored=True)),
    "bf16-logits": ShardedCase(case=Case(dtype=BF16, logits_dtype=BF16, padded_size=304)),
}


def compute_on_ranks() -> dict[tuple[str, str], Outcome]:
    """Return this rank's results of the cases with each objective."""
    found = {}
    for name, sharded in CASES.items():
        for kind in OBJECTIVES:
            with pytest.MonkeyPatch.context() as patch:
                if sharded.tiny_tiles:
                    columns = sharded.case.padded_size // dist.get_world_size()
                    row_bytes = columns * sharded.case.logits_dtype.itemsize
                    patch.setattr(lm_head_tiles, "TILE_ROWS", {"cpu": 16})
                    patch.setattr(lm_head_tiles, "TILE_BYTES", {"cpu": 4 * 16 * 128})
                    patch.setattr(lm_head_tiles, "CHUNK_BYTES", {"cpu": 40 * row_bytes})
                    patch.setattr(op, "BLOCK_ELEMENTS", {"cpu": 3 * columns})
                found[kind, name] = compute(kind, sharded.case)
    return found


def compute(kind: str, case: Case) -> Outcome:
    """Return this rank's result of a case, from its own columns; the gradient is in main_grad."""
    batch, teacher = case.batch(), teacher_of(case)
    columns = case.padded_size // dist.get_world_size()
    own = slice(dist.get_rank() * columns, (dist.get_rank() + 1) * columns)
    weight = torch.nn.Parameter(batch.weight_VpH[own].clone())
    weight.main_grad = torch.zeros(weight.shape)
    head, teacher_head = (
        LMHead(
            weight_VpH=shard,
            vocab_size=case.vocab_size,
            tp_group=dist.group.WORLD,
            logits_dtype=case.logits_dtype,
        )
        for shard in (weight, teacher.weight_VpG[own].clone())
    )
    hidden_NH, _ = leaves(batch)
    result = op.fused_vocabulary_gradient(
        hidden_NH, head, teacher.hidden_NG, teacher_head, batch.targets_N, OBJECTIVES[kind]
    )
    torch.testing.assert_close(result.loss, result.loss_N.sum())
    result.loss.backward()
    assert weight.grad is None
    return Outcome(*result[1:], hidden_grad_NH=hidden_NH.grad, weight_grad_VpH=weight.main_grad)


@pytest.fixture(scope="module", params=TP_SIZES, ids=lambda size: f"TP{size}")
def results(
    request: pytest.FixtureRequest, ranks: RankPool
) -> list[dict[tuple[str, str], Outcome]]:
    """Return the results of every rank for each objective and case."""
    return ranks.run(compute_on_ranks, world_size=request.param)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_shards_give_the_values_and_gradients_of_dense_fp64_autograd(
    kind: str, name: str, results: list[dict[tuple[str, str], Outcome]]
) -> None:
    """In bf16 at most twice the error of plain torch on the whole vocabulary."""
    case, found = CASES[name].case, [of_rank[kind, name] for of_rank in results]
    batch, teacher = case.batch(), teacher_of(case)
    truth = dense(kind, case, batch, teacher)
    torchs = dense(kind, case, batch, teacher, dtype=case.dtype, logits_dtype=case.logits_dtype)
    whole = found[0]._replace(
        hidden_grad_NH=sum(result.hidden_grad_NH.double() for result in found),
        weight_grad_VpH=torch.cat([result.weight_grad_VpH for result in found]),
    )
    for quantity in truth._fields:
        expected = getattr(truth, quantity)
        allowed = ROUNDING
        if case.dtype == BF16:
            allowed += 2 * error(getattr(torchs, quantity), expected)
        assert error(getattr(whole, quantity), expected) <= allowed, quantity
    assert not whole.weight_grad_VpH[case.vocab_size :].any()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_all_ranks_have_the_same_bits(
    kind: str, name: str, results: list[dict[tuple[str, str], Outcome]]
) -> None:
    first, *others = (of_rank[kind, name] for of_rank in results)
    for other in others:
        for quantity in ("loss_N", "reverse_kl_N", "logp_N", "teacher_logp_N", "entropy_N"):
            assert torch.equal(getattr(other, quantity), getattr(first, quantity))
