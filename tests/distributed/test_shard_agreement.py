"""Ranks whose shards don't make one vocabulary are all refused, and none of them waits.

Shapes: N tokens, H hidden, Vp columns of the vocabulary on this rank (padding included).
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from support.lm_head_cases import HEADS, Batch, loss_of, power
from support.rank_pool import RankPool

from poweropd_megatron.ops import lm_head_tiles
from poweropd_megatron.ops.lm_head import score
from poweropd_megatron.ops.lm_head_tiles import LMHead
from poweropd_megatron.ops.logprob import vocab_parallel_logprob

OPERATIONS = ("logits", "score", *HEADS)
HIDDEN_SIZE = 3


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What a rank brings."""

    columns: int = 6
    vocab_size: int = 11
    targets: tuple[int, ...] = (0, 5, 7, -100, 10)


@dataclass(frozen=True, kw_only=True)
class Odd:
    """What the last rank brings and what the others do, and what all are told."""

    shard: Shard
    message: str
    others: Shard = Shard()

    @property
    def usual(self) -> int:
        """Return the number that the others have, where the message has numbers."""
        return self.others.vocab_size if "vocab_size" in self.message else self.others.columns


ODD = {
    "more-columns": Odd(
        shard=Shard(columns=8),
        message="the ranks have [{others}8] columns (of logits_NVp, weight_VpH): expected the same "
        "number on each, padding included",
    ),
    "a-target-that-no-rank-has": Odd(
        others=Shard(columns=5),
        shard=Shard(columns=9),
        message="the ranks have [{others}9] columns",
    ),
    "columns-that-would-do-on-one-rank-alone": Odd(
        others=Shard(columns=1),
        shard=Shard(columns=20),
        message="the ranks have [{others}20] columns",
    ),
    "another-vocabulary": Odd(
        shard=Shard(vocab_size=12),
        message="vocab_size is [{others}12] on the ranks: expected the same",
    ),
    "another-target": Odd(
        shard=Shard(targets=(0, 5, 8, -100, 10)), message="targets_N differs between the ranks"
    ),
    "targets-in-another-order": Odd(
        shard=Shard(targets=(5, 0, 7, -100, 10)), message="targets_N differs between the ranks"
    ),
    "another-row-ignored": Odd(
        shard=Shard(targets=(0, 5, -100, 7, 10)), message="targets_N differs between the ranks"
    ),
}


def refusals(odd: dict[str, Odd], operations: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """Return what this rank is told in each case, by each operation."""
    is_odd = dist.get_rank() == dist.get_world_size() - 1
    # Chunks of a token or two: by its own columns a rank would gather other rows than the rest.
    lm_head_tiles.CHUNK_BYTES = {"cpu": 50}
    told = {}
    for name, case in odd.items():
        for operation in operations:
            try:
                apply(operation, case.shard if is_odd else case.others)
            except ValueError as error:
                told[name, operation] = str(error)
    return told


def apply(operation: str, shard: Shard) -> None:
    """Run an operation on a rank's shard of zeros."""
    targets_N = torch.tensor(shard.targets)
    if operation == "logits":
        logits_NVp = torch.zeros(len(targets_N), shard.columns)
        vocab_parallel_logprob(
            logits_NVp, targets_N, vocab_size=shard.vocab_size, tp_group=dist.group.WORLD
        )
        return
    hidden_NH = torch.zeros(len(targets_N), HIDDEN_SIZE, requires_grad=True)
    weight = torch.nn.Parameter(torch.zeros(shard.columns, HIDDEN_SIZE))
    head = LMHead(weight_VpH=weight, vocab_size=shard.vocab_size, tp_group=dist.group.WORLD)
    if operation == "score":
        score(hidden_NH, head, targets_N)
        return
    batch = Batch(hidden_NH, weight, targets_N, -torch.ones(len(targets_N)))
    loss_of(operation, hidden_NH, head, batch, power)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_every_rank_is_told_what_differs(tp_size: int, ranks: RankPool) -> None:
    by_rank = ranks.run(refusals, ODD, OPERATIONS, world_size=tp_size)
    for told in by_rank:
        for name, case in ODD.items():
            expected = case.message.format(others=f"{case.usual}, " * (tp_size - 1))
            for operation in OPERATIONS:
                assert told[name, operation].startswith(expected), (name, operation)


def test_shards_that_agree_are_not_refused(ranks: RankPool) -> None:
    fitting = {"alike": Odd(shard=Shard(), message="")}
    assert ranks.run(refusals, fitting, OPERATIONS, world_size=2) == [{}, {}]
    padded = {"alike": Odd(shard=Shard(columns=9), others=Shard(columns=9), message="")}
    assert ranks.run(refusals, padded, OPERATIONS, world_size=2) == [{}, {}]
