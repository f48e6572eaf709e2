"""Who has which row when: groups of rows with scripted responses instead of a model."""

import random
from collections import deque
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from poweropd_megatron.models.kv_cache import KVCache
from poweropd_megatron.rollout.responses import Responses
from poweropd_megatron.rollout.row_group import RowGroup, RowPolicy, Share
from poweropd_megatron.rollout.sampling import Draw
from poweropd_megatron.rollout.trajectories import FINISH_LENGTH, FINISH_STOP

STOP, LIMIT, CPU = 7, 20, torch.device("cpu")


class Script:
    """Responses of given lengths; notes the forward of each turn: ("prompts" or "tokens", rows)."""

    def __init__(self, lengths: Sequence[int], num_rows: int, policy: RowPolicy) -> None:
        self.turns: list[tuple[str, int]] = []
        self._lengths = lengths
        self.share = Share(
            prompts=[[1] * (1 + prompt % 3) for prompt in range(len(lengths))],
            waiting=deque(range(len(lengths))),
            uniforms=lambda prompt: prompt * LIMIT + torch.arange(LIMIT, dtype=torch.float64),
            stop_token_ids=torch.tensor([STOP]),
            responses=Responses.empty(len(lengths), LIMIT),
        )
        self.group = RowGroup(
            num_rows,
            self.share,
            self._forward,
            self,  # type: ignore[arg-type]
            num_layers=1,
            max_new_tokens=LIMIT,
            policy=policy,
            with_graph=False,
            device=CPU,
        )

    def run(self) -> None:
        """Decode all that waits."""
        self.group.finish()
        while self.group.num_live or self.share.waiting:
            self.group.start()
            self.group.finish()

    def _forward(self, token_ids_BS: Tensor, cache: KVCache, *, last_position_B: Tensor) -> None:
        joins = cache.joining_J is not None
        assert cache.shape[0] >= len(token_ids_BS)
        assert last_position_B.shape == token_ids_BS.shape[:1]
        self.turns.append(("prompts" if joins else "tokens", len(token_ids_BS)))

    def start(self, _logits: Tensor | None, uniform_B: Tensor) -> "Script":
        """Draw as TokenDrawer does: the number of the prompt, and at last STOP."""
        self._numbers = uniform_B.long()
        return self

    def wait(self) -> Draw:
        """Return the draw, with the random number as its log-prob."""
        prompts, steps = self._numbers // LIMIT, self._numbers % LIMIT
        ends = steps + 1 == torch.tensor([self._lengths[prompt] for prompt in prompts])
        tokens = torch.where(ends, STOP, 100 + prompts)
        return Draw(tokens, self._numbers.float(), torch.zeros(len(tokens)))


@pytest.mark.parametrize("seed", range(10))
def test_every_response_is_noted_whole_in_its_own_place(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, LIMIT + 3) for _ in range(rng.randint(1, 30))]
    policy = RowPolicy(refill_at=rng.choice([0.01, 0.25, 1.0]), shrink_at=rng.choice([0, 0.5, 1]))
    script = Script(lengths, rng.randint(1, len(lengths)), policy)
    script.run()
    responses = script.share.responses
    for prompt, length in enumerate(lengths):
        count = min(length, LIMIT)
        tokens = [100 + prompt] * count
        if length <= LIMIT:
            tokens[-1] = STOP
        assert responses.token_ids[prompt].tolist() == tokens + [0] * (LIMIT - count)
        assert responses.logp[prompt, :count].tolist() == list(
            range(prompt * LIMIT, prompt * LIMIT + count)
        )
        assert responses.lengths[prompt] == count
        assert responses.finish[prompt] == (FINISH_STOP if length <= LIMIT else FINISH_LENGTH)


def test_waiting_prompts_join_once_a_quarter_of_the_rows_is_free() -> None:
    script = Script([2, 3, 3, 9, 9, 9, 9, 9, 4, 1], 8, RowPolicy())
    script.run()
    assert script.turns == [
        ("prompts", 8),
        ("tokens", 8),  # one row of eight ends: too few
        ("tokens", 8),  # two more end, and the last two prompts join
        ("prompts", 2),  # one of them ends with its first token
        *[("tokens", 6)] * 3,  # none waits: rows leave as they end
        *[("tokens", 5)] * 3,
    ]


def test_without_refilling_and_shrinking_all_rows_go_on_until_the_longest_ends() -> None:
    script = Script([2, 3, 6, 2, 4, 1], 3, RowPolicy(refill_at=1.0, shrink_at=0.0))
    script.run()
    assert script.turns == [
        ("prompts", 3),
        *[("tokens", 3)] * 5,
        ("prompts", 3),
        *[("tokens", 3)] * 3,
    ]


def test_rows_that_are_few_enough_to_record_a_step_again_leave_together() -> None:
    script = Script([2, 3, 4, 6], 4, RowPolicy(shrink_at=0.5))
    script.run()
    assert script.turns == [
        ("prompts", 4),
        *[("tokens", 4)] * 2,
        *[("tokens", 2)],
        *[("tokens", 1)] * 2,
    ]


def test_a_group_with_nothing_left_keeps_others_company_without_a_draw() -> None:
    script = Script([1], 1, RowPolicy())
    script.run()
    for _ in range(2):
        script.group.start()
        script.group.finish()
    assert script.turns == [("prompts", 1)] * 3
    assert script.share.responses.lengths.tolist() == [1]
