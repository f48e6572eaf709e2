"""Rows that are decoded together, and the prompts that take them one after the other.

Shapes: B rows of the group, J rows that join, R tokens of the longest response.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from poweropd_megatron.models.kv_cache import KVCache
from poweropd_megatron.rollout.decode_step import DecodeStep
from poweropd_megatron.rollout.draws import PendingDraw, TokenDrawer
from poweropd_megatron.rollout.responses import Responses
from poweropd_megatron.rollout.trajectories import FINISH_STOP

_FREE = -1


class CachedForward(Protocol):
    """The student's forward over a cache, to the logits of the token after each row's last."""

    def __call__(
        self, token_ids_BS: Tensor, cache: KVCache, *, last_position_B: Tensor
    ) -> Tensor | None:
        """Return them, [B, Vp]; None off the last stage."""
        ...


@dataclass(frozen=True, kw_only=True)
class RowPolicy:
    """What becomes of the rows of responses that have ended."""

    refill_at: float = 0.25
    """While prompts wait: the share of free rows from which on they take them."""
    shrink_at: float = 1.0
    """When none waits any more: the share of live rows down to which free ones stay."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A rank's share of a rollout's prompts, numbered from 0."""

    prompts: Sequence[Sequence[int]]
    waiting: deque[int]
    """Those that no row has taken yet."""
    uniforms: Callable[[int], Tensor]
    """The random numbers of a prompt's response, [R]."""
    stop_token_ids: Tensor
    responses: Responses


class RowGroup:
    """Rows with a cache of their own. In each turn: one forward, of prompts or of a token a row.

    A turn ends with a draw that is started (`start`); the next begins with what was drawn
    (`finish`), so that other groups have their turns between the two.
    """

    def __init__(
        self,
        num_rows: int,
        share: Share,
        forward: CachedForward,
        drawer: TokenDrawer,
        *,
        num_layers: int,
        max_new_tokens: int,
        policy: RowPolicy,
        with_graph: bool,
        device: torch.device,
    ) -> None:
        self._share = share
        self._forward = forward
        self._drawer = drawer
        self._num_layers = num_layers
        self._policy = policy
        self._device = device
        self._max_new_tokens = max_new_tokens
        self._prompt_of_row = torch.full((num_rows,), _FREE)
        self._num_drawn = torch.zeros(num_rows, dtype=torch.int64)
        self._uniform_BR = torch.zeros(num_rows, max_new_tokens, dtype=torch.float64)
        self._tokens_B = torch.zeros(num_rows, dtype=torch.int64)
        self._cache = KVCache(num_layers, num_rows, device)
        self._decode_step = DecodeStep(self._put_tokens, self._cache, with_graph=with_graph)
        self._pending: tuple[Tensor, PendingDraw] | None = None

    @property
    def num_live(self) -> int:
        """Return how many rows have a response that goes on."""
        return int((self._prompt_of_row != _FREE).sum())

    def finish(self) -> None:
        """Wait for the tokens of the turn before, note them, and free the rows that end."""
        if self._pending is None:
            return
        rows, pending = self._pending
        self._pending = None
        drawn = pending.wait()
        self._tokens_B[rows] = drawn.token_B
        is_live = self._prompt_of_row[rows] != _FREE
        rows = rows[is_live]
        prompt, step = self._prompt_of_row[rows], self._num_drawn[rows]
        responses = self._share.responses
        responses.token_ids[prompt, step] = drawn.token_B[is_live]
        responses.logp[prompt, step] = drawn.logp_B[is_live]
        responses.truncated_mass[prompt, step] = drawn.truncated_mass_B[is_live]
        responses.lengths[prompt] = step + 1
        stops = torch.isin(drawn.token_B[is_live], self._share.stop_token_ids)
        responses.finish[prompt[stops]] = FINISH_STOP
        self._num_drawn[rows] = step + 1
        self._free(rows[stops | (step + 1 == self._max_new_tokens)])

    def start(self) -> None:
        """Run this turn's forward and start its draw.

        Waiting prompts join once enough rows are free. Without any row to go on with, one row that
        is nobody's keeps the ranks company that share experts with this one.
        """
        waiting, num_rows = len(self._share.waiting), len(self._prompt_of_row)
        num_free = num_rows - self.num_live
        if waiting and num_free >= self._policy.refill_at * num_rows:
            self._refill(min(num_free, waiting))
        elif num_free < num_rows:
            if not waiting:
                self._shrink()
            self._draw(
                torch.arange(len(self._tokens_B)),
                self._decode_step(self._tokens_B.to(self._device)),
            )
        else:
            self._idle()

    def _free(self, rows: Tensor) -> None:
        if len(rows):
            self._prompt_of_row[rows] = _FREE
            self._num_drawn[rows] = 0
            self._cache.release(rows.tolist())

    def _refill(self, count: int) -> None:
        """Let this many waiting prompts join, in free rows."""
        rows = torch.nonzero(self._prompt_of_row == _FREE)[:count, 0]
        joining = [self._share.waiting.popleft() for _ in range(count)]
        self._prompt_of_row[rows] = torch.tensor(joining)
        self._uniform_BR[rows] = torch.stack([self._share.uniforms(prompt) for prompt in joining])
        prompts = [self._share.prompts[prompt] for prompt in joining]
        self._cache.admit(rows.tolist(), [len(prompt) for prompt in prompts])
        self._draw(rows, self._put_prompts(prompts, self._cache))

    def _shrink(self) -> None:
        """Give up free rows, if so many are free that it is worth it."""
        num_live, num_rows = self.num_live, len(self._prompt_of_row)
        if num_live == num_rows or num_live > self._policy.shrink_at * num_rows:
            return
        live = torch.nonzero(self._prompt_of_row != _FREE)[:, 0]
        self._prompt_of_row, self._num_drawn = self._prompt_of_row[live], self._num_drawn[live]
        self._uniform_BR, self._tokens_B = self._uniform_BR[live], self._tokens_B[live]
        self._cache.keep_rows(live.tolist())

    def _idle(self) -> None:
        cache = KVCache(self._num_layers, 1, self._device)
        cache.admit([0], [1])
        self._put_prompts([[0]], cache)

    def _draw(self, rows: Tensor, logits: Tensor | None) -> None:
        uniform_B = self._uniform_BR[rows, self._num_drawn[rows]]
        self._pending = rows, self._drawer.start(logits, uniform_B)

    def _put_prompts(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor | None:
        """Return the logits after each of the prompts, which join the cache."""
        lengths_J = torch.tensor([len(prompt) for prompt in prompts])
        token_ids_JS = torch.zeros(len(prompts), int(lengths_J.max()), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            token_ids_JS[row, : len(prompt)] = torch.tensor(prompt)
        last_position_J = (lengths_J - 1).to(self._device)
        return self._forward(token_ids_JS, cache, last_position_B=last_position_J)

    def _put_tokens(self, token_ids_B1: Tensor) -> Tensor | None:
        """Return the logits after one more token on each row."""
        first_B = torch.zeros_like(self._cache.positions_B)
        return self._forward(token_ids_B1, self._cache, last_position_B=first_B)
