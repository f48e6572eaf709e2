"""The in-process rollout engine: the student's own Megatron modules, with a KV cache.

Shapes: B sequences decoded together, S positions of the longest prompt, Vp vocabulary columns on
this rank.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from poweropd_megatron.models.finite import check_finite
from poweropd_megatron.models.kv_cache import KVCache, attached
from poweropd_megatron.models.scoring import NextToken, next_token_logits
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.pipeline import forward_stage
from poweropd_megatron.parallel.world import most_rows, own_rows
from poweropd_megatron.rollout.decode_mode import decoding_mode, set_positions
from poweropd_megatron.rollout.decode_step import DecodeStep
from poweropd_megatron.rollout.responses import Responses
from poweropd_megatron.rollout.sampling import Sampling, draw_tokens, uniforms
from poweropd_megatron.rollout.trajectories import FINISH_STOP, Trajectories

_ENDED = -1


class MegatronRolloutEngine:
    """Decodes with the student itself: rollouts and training agree, and no weights are sent.

    Each copy of the model, of data or of context parallelism, decodes its own share of the prompts,
    `micro_batch_size` at a time; sequences leave the batch when they end. The last pipeline stage
    draws the tokens and tells the others. Ranks that share experts decode in step: one that has
    nothing left to decode goes on with one row, which is nobody's, until the others are done too.
    """

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        layout: Layout,
        *,
        vocab_size: int,
        stop_token_ids: Sequence[int],
        micro_batch_size: int,
        logits_dtype: torch.dtype,
        seed: int,
        cuda_graph: bool,
    ) -> None:
        self._chunks = chunks
        self._layout = layout
        self._vocab_size = vocab_size
        self._stop_token_ids = torch.tensor(sorted(stop_token_ids))
        self._micro_batch_size = micro_batch_size
        self._logits_dtype = logits_dtype
        self._seed = seed
        # Tokens for experts are counted on the CPU before each exchange: no graph can do that.
        has_experts = any(chunk.config.num_moe_experts is not None for chunk in chunks)
        self._with_graph = (
            cuda_graph and layout.device.type == "cuda" and layout.pp_size == 1 and not has_experts
        )
        self._shrink_at = 0.5 if self._with_graph else 1.0

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        stream: tuple[int, ...],
        weight_version: int,
        first_sequence: int = 0,
    ) -> Trajectories:
        """Return one response for each prompt; see RolloutEngine.

        Called by all ranks of the job; those without the student only learn the trajectories.
        Raises: NonFiniteError on every rank if the student's log-probs were NaN.
        Cost: one forward a token and micro-batch; with TP a gather of the logits and with TP or PP
        a broadcast of the tokens each, as with shared experts an all_reduce of one number; at the
        end one all_reduce of each field of the trajectories.
        """
        rows, responses = self._respond(prompts, sampling, stream, first_sequence)
        trajectories = responses.assemble(prompts, rows, self._layout, weight_version)
        check_finite(
            "log-probs of the rollout",
            trajectories.behaviour_logp_BT,
            _advice(weight_version),
            may_be_impossible=True,
        )
        return trajectories

    def _respond(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stream: tuple[int, ...],
        first_sequence: int,
    ) -> tuple[Tensor, Responses]:
        """Return the numbers of this rank's prompts, and their responses."""
        layout = self._layout
        if not layout.holds_model:
            none = torch.zeros(0, dtype=torch.int64)
            return none, Responses.empty(0, sampling.max_new_tokens)
        rows = own_rows(len(prompts), rank=layout.copy_rank, size=layout.num_copies)
        most = most_rows(len(prompts), ranks=layout.copies_in_step, size=layout.num_copies)
        responses = Responses.empty(len(rows), sampling.max_new_tokens)
        with decoding_mode(self._chunks, layout):
            for start in range(0, most, self._micro_batch_size):
                part = torch.arange(len(rows))[start : start + self._micro_batch_size]
                own_prompts = [prompts[i] for i in rows[part].tolist()]
                sequences = rows[part] + first_sequence
                self._decode(own_prompts, sequences, part, responses, sampling, stream)
        return rows, responses

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        sequences: Tensor,
        slots: Tensor,
        responses: Responses,
        sampling: Sampling,
        stream: tuple[int, ...],
    ) -> None:
        """Decode prompts, number `sequences` of the stream, into their slots of `responses`.

        Without prompts, keep the ranks company that share experts with this one.
        """
        if not prompts:
            prompts, sequences, slots = [[0]], torch.tensor([0]), torch.tensor([_ENDED])
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self._layout.device)
        token_ids = torch.zeros(len(prompts), int(lengths_B.max()), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = torch.tensor(prompt)
        uniform_BT = torch.from_numpy(
            np.stack(
                [
                    uniforms(
                        seed=self._seed, stream=stream, sequence=i, count=sampling.max_new_tokens
                    )
                    for i in sequences.tolist()
                ]
            )
        )
        set_positions(self._chunks, None)
        cache = KVCache(sum(len(chunk.decoder.layers) for chunk in self._chunks), lengths_B)
        with attached(self._chunks, cache):
            logits = self._forward(token_ids, last_position_B=lengths_B - 1)
            decode_step = self._decode_step(cache)
            for step in range(sampling.max_new_tokens):
                tokens_B = self._draw(logits, uniform_BT[:, step], step, slots, responses, sampling)
                is_live = slots >= 0
                num_live = int(is_live.sum())
                if step == sampling.max_new_tokens - 1 or self._all_ended(num_live):
                    break
                if num_live <= self._shrink_at * len(slots) and num_live < len(slots):
                    live = torch.nonzero(is_live)[:, 0] if num_live else torch.tensor([0])
                    slots, uniform_BT, tokens_B = slots[live], uniform_BT[live], tokens_B[live]
                    cache.keep_rows(live.to(self._layout.device))
                logits = decode_step(tokens_B.to(self._layout.device))

    def _all_ended(self, num_live: int) -> bool:
        """Return whether no row of this rank and of those that share experts with it goes on."""
        if len(self._layout.copies_in_step) == 1:
            return num_live == 0
        count = torch.tensor(num_live, device=self._layout.device)
        dist.all_reduce(count, group=self._layout.groups.ep)
        return not count.item()

    def _forward(self, token_ids_BS: Tensor, *, last_position_B: Tensor) -> Tensor | None:
        """Return the logits of the token after each row's last position, [B, Vp]."""
        logits: Tensor | None = forward_stage(
            self._chunks,
            self._layout,
            token_ids_BS,
            output_processor=next_token_logits,
            context=NextToken(
                last_position_B=last_position_B,
                tp_group=self._layout.groups.tp,
                logits_dtype=self._logits_dtype,
            ),
        )
        return logits

    def _decode_step(self, cache: KVCache) -> DecodeStep:
        """Return what puts one more token on each row."""

        def forward(token_ids_B1: Tensor) -> Tensor | None:
            set_positions(self._chunks, cache.positions_B)
            return self._forward(token_ids_B1, last_position_B=torch.zeros_like(cache.positions_B))

        return DecodeStep(forward, cache, with_graph=self._with_graph)

    def _draw(
        self,
        logits_BVp: Tensor | None,
        uniform_B: Tensor,
        step: int,
        slots: Tensor,
        responses: Responses,
        sampling: Sampling,
    ) -> Tensor:
        """Return the next token of each row, on the whole model copy, after noting it.

        Rows whose slot is negative have ended; the slots of those that end here become so.
        """
        whole = None if logits_BVp is None else self._gather_vocabulary(logits_BVp)
        drawn = torch.zeros(3, len(slots), dtype=torch.float64, device=self._layout.device)
        if whole is not None:
            drawn[0], drawn[1], drawn[2] = draw_tokens(whole, uniform_B, sampling)
        if dist.get_world_size(self._layout.groups.mp) > 1:
            dist.broadcast(drawn, src=self._layout.speaker, group=self._layout.groups.mp)
        drawn = drawn.cpu()
        tokens_B = drawn[0].long()
        is_live = slots >= 0
        live = slots[is_live]
        responses.token_ids[live, step] = tokens_B[is_live]
        responses.logp[live, step] = drawn[1, is_live].float()
        responses.truncated_mass[live, step] = drawn[2, is_live].float()
        responses.lengths[live] = step + 1
        ends = is_live & torch.isin(tokens_B, self._stop_token_ids)
        responses.finish[slots[ends]] = FINISH_STOP
        slots[ends] = _ENDED
        return tokens_B

    def _gather_vocabulary(self, logits_BVp: Tensor) -> Tensor | None:
        """Return the logits over the whole vocabulary, without padding, on the rank that draws."""
        if self._layout.tp_size == 1:
            return logits_BVp[:, : self._vocab_size]
        shards = (
            [torch.empty_like(logits_BVp) for _ in range(self._layout.tp_size)]
            if self._layout.speaks_for_model
            else None
        )
        dist.gather(logits_BVp, shards, dst=self._layout.speaker, group=self._layout.groups.tp)
        return None if shards is None else torch.cat(shards, dim=1)[:, : self._vocab_size]


def _advice(weight_version: int) -> str:
    """Return what to look into when the student can't draw: its folder, or what training did."""
    if weight_version == 0:
        return (
            "the student hasn't been trained yet. Check the weights in student.path for NaN, and "
            "whether student.dtype can hold its activations"
        )
    return (
        f"{weight_version} steps of training have made the student so. Lower optimizer.lr or set "
        "optimizer.clip_grad, and go on from an earlier checkpoint or start anew"
    )
