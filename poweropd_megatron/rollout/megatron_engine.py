"""The in-process rollout engine: the student's own Megatron modules, with a KV cache.

Shapes: B rows, S positions of the longest prompt, Vp vocabulary columns on this rank.
"""

from collections import deque
from collections.abc import Sequence

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
from poweropd_megatron.rollout.draws import TokenDrawer
from poweropd_megatron.rollout.responses import Responses
from poweropd_megatron.rollout.row_group import RowGroup, RowPolicy, Share
from poweropd_megatron.rollout.sampling import Sampling, uniforms
from poweropd_megatron.rollout.trajectories import Trajectories


class MegatronRolloutEngine:
    """Decodes with the student itself: rollouts and training agree, and no weights are sent.

    Each copy of the model, of data or of context parallelism, decodes its own share of the prompts,
    at most `micro_batch_size` at a time: as responses end, waiting prompts take their rows. With
    pipeline stages the rows form as many groups, which have their turns one after the other, so
    that each stage works on another group. The last stage draws the tokens and tells the others,
    who wait for them only when that group's next turn begins. Ranks that share experts decode in
    step: one that has nothing left to decode in a group goes on with one row, which is nobody's,
    until the others are done too.
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
        self.num_groups = layout.pp_size
        # A graph is recorded anew for each number of rows.
        self.row_policy = RowPolicy(shrink_at=0.5 if self._with_graph else 1.0)

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
        Cost: a forward for each turn of each group, of a token a row or of the prompts that join;
        with TP a gather of the logits and with TP or PP a broadcast of the tokens each, as with
        shared experts an all_reduce of one number; at the end one all_reduce of each field of the
        trajectories.
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

        def own_uniforms(prompt: int) -> Tensor:
            return torch.from_numpy(
                uniforms(
                    seed=self._seed,
                    stream=stream,
                    sequence=first_sequence + int(rows[prompt]),
                    count=sampling.max_new_tokens,
                )
            )

        share = Share(
            prompts=[prompts[i] for i in rows.tolist()],
            waiting=deque(range(len(rows))),
            uniforms=own_uniforms,
            stop_token_ids=self._stop_token_ids,
            responses=Responses.empty(len(rows), sampling.max_new_tokens),
        )
        with decoding_mode(self._chunks, layout):
            self._decode(self._groups(share, sampling, most), share)
        return rows, share.responses

    def _groups(self, share: Share, sampling: Sampling, most: int) -> list[RowGroup]:
        """Return the groups of rows; fewer than num_groups if there aren't as many rows.

        As many on all ranks that decode in step, of whose shares the largest has `most` prompts.
        """
        num_rows = min(self._micro_batch_size, len(share.prompts))
        num_groups = min(self.num_groups, self._micro_batch_size, most)
        drawer = TokenDrawer(self._layout, vocab_size=self._vocab_size, sampling=sampling)
        return [
            RowGroup(
                len(own_rows(num_rows, rank=number, size=num_groups)),
                share,
                self._forward,
                drawer,
                num_layers=sum(len(chunk.decoder.layers) for chunk in self._chunks),
                max_new_tokens=sampling.max_new_tokens,
                policy=self.row_policy,
                with_graph=self._with_graph,
                device=self._layout.device,
            )
            for number in range(num_groups)
        ]

    def _decode(self, groups: Sequence[RowGroup], share: Share) -> None:
        """Decode the share's prompts, in the groups' rows."""
        running = list(groups)
        while running:
            for group in list(running):
                group.finish()
                if self._goes_on(group.num_live + len(share.waiting)):
                    group.start()
                else:
                    running.remove(group)

    def _goes_on(self, num_responses: int) -> bool:
        """Return whether this rank, or one that shares experts with it, has responses left."""
        if len(self._layout.copies_in_step) == 1:
            return num_responses > 0
        count = torch.tensor(num_responses, device=self._layout.device)
        dist.all_reduce(count, group=self._layout.groups.ep)
        return bool(count.item())

    def _forward(
        self, token_ids_BS: Tensor, cache: KVCache, *, last_position_B: Tensor
    ) -> Tensor | None:
        """Return the logits of the token after each row's last position; see CachedForward."""
        set_positions(self._chunks, cache.positions_B if cache.joining_J is None else None)
        with attached(self._chunks, cache):
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
