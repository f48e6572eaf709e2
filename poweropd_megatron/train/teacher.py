"""The frozen teacher: log-probs of the student's tokens, or hidden states that predict them.

Shapes: B sequences, T tokens, N tokens in the loss, G hidden.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd_megatron.config.schema import DType, TeacherConfig
from poweropd_megatron.models.build import TORCH_DTYPES, build_model
from poweropd_megatron.models.finite import check_finite
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.offload import OffloadedParameters
from poweropd_megatron.models.scoring import hidden_of_chosen
from poweropd_megatron.objectives.labels import Labels
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.world import largest, share_rows
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.batching import Batching
from poweropd_megatron.train.microbatches import MicroBatch, cut_own, rows_of
from poweropd_megatron.train.score_tokens import outputs_of, score_tokens
from poweropd_megatron.train.teacher_hidden import Handed, OwnHidden, copies_of_tokens, exchange


@dataclass(frozen=True, kw_only=True)
class OwnScores:
    """What this rank scored of some sequences: logp_BT holds their tokens, `rows` which they are.

    On ranks without the teacher, no rows.
    """

    logp_BT: Tensor
    rows: Tensor


class Teacher:
    """A model in its own layout that only scores: no gradients, no optimizer."""

    def __init__(
        self, config: TeacherConfig, model: ModelConfig, layout: Layout, *, logits_dtype: DType
    ) -> None:
        """Load the teacher's shards. Raises: InputError if the folder's tensors don't fit."""
        self._config = config
        self._logits_dtype = TORCH_DTYPES[logits_dtype]
        self._vocab_size, self._hidden_size = model.vocab_size, model.hidden_size
        self._layout = layout
        self._busy_seconds = self._load_seconds = 0.0
        self.batching = Batching.of(
            layout,
            micro_batch_size=config.micro_batch_size,
            max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        )
        self.chunks = build_model(
            model,
            layout,
            folder=config.path,
            dtype=config.dtype,
            setting="teacher.path",
            megatron=config.megatron,
        )
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
        self._checksum = self._sum_up()
        self._offloaded: OffloadedParameters | None = None
        if config.offload:
            parameters = [weight for chunk in self.chunks for weight in chunk.parameters()]
            self._offloaded = OffloadedParameters(parameters, layout.device)

    def score(self, trajectories: Trajectories, labels: Labels) -> Tensor:
        """Return log p_T of each token in the loss, [B, T] fp32 on the CPU of every rank; 0
        elsewhere. Called by all ranks of the job.

        Raises, Cost: as score_own and shared together.
        """
        return self.shared([self.score_own(trajectories, labels)])

    @torch.no_grad()
    def score_own(self, trajectories: Trajectories, labels: Labels) -> OwnScores:
        """Return this rank's share of the scores, without waiting for ranks outside the teacher.

        Cost: a forward of each sequence on one of the teacher's copies; with teacher.offload, a
        copy of the weights to the device unless they are there.
        """
        own, start = self._cut(trajectories, labels), time.perf_counter()
        self._load()
        logp_BT = score_tokens(
            self.chunks,
            self._layout,
            own,
            labels.teacher_BT,
            vocab_size=self._vocab_size,
            logits_dtype=self._logits_dtype,
        )
        self._busy_seconds += time.perf_counter() - start
        return OwnScores(logp_BT=logp_BT, rows=rows_of(own))

    @torch.no_grad()
    def hidden_own(self, trajectories: Trajectories, labels: Labels) -> OwnHidden:
        """Return this rank's share of the final hidden states that predict the tokens in the loss,
        without waiting for ranks outside the teacher.

        Cost: as score_own, less the head; on the ranks that speak for the teacher's copies, the
        hidden states of their tokens in CPU memory.
        """
        own, start = self._cut(trajectories, labels), time.perf_counter()
        self._load()
        found = [
            (micro_batch.target_RS[micro_batch.mask_RS], hidden_NG.cpu())
            for micro_batch, hidden_NG in outputs_of(
                self.chunks,
                self._layout,
                own,
                labels.teacher_BT,
                hidden_of_chosen,
                vocab_size=self._vocab_size,
                logits_dtype=self._logits_dtype,
            )
            if hidden_NG is not None and self._layout.speaks_for_model
        ]
        self._busy_seconds += time.perf_counter() - start
        return OwnHidden.of(found, copies_of_tokens(trajectories, labels.mask_BT, self.batching))

    def hand_over(self, parts: Sequence[OwnHidden], student: Layout, copy_BT: Tensor) -> Handed:
        """Return, on each rank that speaks for a copy of the student, the hidden states of that
        copy's tokens, given those of consecutive parts of a batch. Called by all ranks of the job.

        copy_BT: which copy of the student trains on each token, as copies_of_tokens has it.
        With teacher.offload the weights leave the device.
        Cost: as exchange.
        """
        if self._offloaded is not None:
            self._offloaded.unload()
        return exchange(
            parts,
            copy_BT,
            teacher=self._layout,
            student=student,
            width=self._hidden_size,
            dtype=TORCH_DTYPES[self._config.dtype],
        )

    def _cut(self, trajectories: Trajectories, labels: Labels) -> list[MicroBatch]:
        return cut_own(trajectories, labels.mask_BT, self.batching, self._layout)

    def _load(self) -> None:
        if self._offloaded is not None and self._layout.holds_model:
            self._load_seconds += self._offloaded.load()

    def shared(self, parts: Sequence[OwnScores]) -> Tensor:
        """Return the scores of consecutive parts of a batch, on the CPU of every rank of the job.

        With teacher.offload the weights leave the device.
        Raises: NonFiniteError on every rank for NaN or +inf; -inf is a token that can't be.
        Cost: one all_reduce of the result.
        """
        if self._offloaded is not None:
            self._offloaded.unload()
        sizes = [len(part.logp_BT) for part in parts]
        width = max(part.logp_BT.shape[1] for part in parts)
        logp_BT = torch.cat(
            [
                torch.nn.functional.pad(part.logp_BT, (0, width - part.logp_BT.shape[1]))
                for part in parts
            ]
        )
        rows = torch.cat([part.rows + sum(sizes[:number]) for number, part in enumerate(parts)])
        whole_BT = share_rows(
            logp_BT[rows],
            rows,
            tuple(logp_BT.shape),
            speaks=self._layout.speaks_for_model,
            device=self._layout.device,
        )
        advice = (
            f"the student was not changed. Check the weights in teacher.path ({self._config.path}) "
            f"for NaN, and whether teacher.dtype = {self._config.dtype!r} can hold its activations"
        )
        check_finite("log-probs of the teacher", whole_BT, advice, may_be_impossible=True)
        return whole_BT

    def read_cost(self) -> dict[str, float]:
        """Return what the scores since the last reading cost the rank that it cost most.

        time/teacher_busy_seconds if the teacher has ranks of its own: scoring, whether or not the
        student waited for it. With teacher.offload memory/teacher_offloaded_bytes, which are off
        the device while nothing is scored, and time/teacher_load_seconds, in which they came back.
        Called by all ranks of the job. Cost: with either setting one all_reduce of three numbers.
        """
        if self._config.num_ranks is None and not self._config.offload:
            return {}
        num_bytes = self._offloaded.num_bytes if self._offloaded is not None else 0
        own = torch.tensor([self._busy_seconds, num_bytes, self._load_seconds], dtype=torch.float64)
        self._busy_seconds = self._load_seconds = 0.0
        busy, offloaded, loading = largest(own, device=self._layout.device).tolist()
        cost = {}
        if self._config.num_ranks is not None:
            cost["time/teacher_busy_seconds"] = busy
        if self._config.offload:
            cost["memory/teacher_offloaded_bytes"] = int(offloaded)
            cost["time/teacher_load_seconds"] = loading
        return cost

    def check_unchanged(self) -> None:
        """Return if the weights are bit by bit those that were loaded. Called by all ranks.

        Raises: RuntimeError on all ranks; no setting can lead there.
        Cost: one read of the weights, one all_reduce of a number.
        """
        is_changed = torch.tensor(self._sum_up() != self._checksum, dtype=torch.float32)
        if largest(is_changed, device=self._layout.device).item():
            raise RuntimeError("the teacher's weights have changed during the run: this is a bug")

    def _sum_up(self) -> list[int]:
        """Return a checksum of each of this rank's weights: the sum of their bits as integers."""
        integers = {2: torch.int16, 4: torch.int32}
        return [
            int(weight.detach().view(integers[weight.element_size()]).sum(dtype=torch.int64))
            for chunk in self.chunks
            for weight in chunk.parameters()
        ]
