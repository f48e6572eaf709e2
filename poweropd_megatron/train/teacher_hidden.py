"""The teacher's final hidden states, from the ranks that computed them to those that need them.

Each rank knows from the lengths which copy of either model has which token, so only the states
travel, each once, from the rank that speaks for a copy of the teacher to the one that speaks for a
copy of the student.
Shapes: B sequences, T tokens, N tokens in the loss, G hidden of the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.batching import Batching
from poweropd_megatron.train.microbatches import MicroBatch, cut_rows

_NOWHERE = -1


@dataclass(frozen=True, kw_only=True)
class OwnHidden:
    """The states of some sequences that a rank computed, and who has the others.

    hidden_NG: by ascending place in the flattened batch, on the CPU; None on ranks that don't speak
    for a copy of the teacher. copy_BT: see copies_of_tokens.
    """

    hidden_NG: Tensor | None
    copy_BT: Tensor

    @classmethod
    def of(cls, found: Sequence[tuple[Tensor, Tensor]], copy_BT: Tensor) -> "OwnHidden":
        """Return what micro-batches found: places in the flattened batch, and states, of each."""
        if not found:
            return cls(hidden_NG=None, copy_BT=copy_BT)
        places, hidden = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        return cls(hidden_NG=hidden[places.argsort()], copy_BT=copy_BT)


@dataclass(frozen=True, kw_only=True)
class Handed:
    """The states of the tokens that a copy of the student trains on, on the rank that speaks for
    it; of no tokens on the others.

    place_N: ascending places in the flattened batch of `width` columns; hidden_NG on the CPU.
    """

    place_N: Tensor
    hidden_NG: Tensor
    width: int

    def __getitem__(self, rows: slice) -> "Handed":
        """Return the states of some of the sequences, whose batch is as wide as all."""
        first, end = (
            int(torch.searchsorted(self.place_N, row * self.width))
            for row in (rows.start, rows.stop)
        )
        return Handed(
            place_N=self.place_N[first:end] - rows.start * self.width,
            hidden_NG=self.hidden_NG[first:end],
            width=self.width,
        )

    def of(self, micro_batch: MicroBatch) -> Tensor:
        """Return the states of a micro-batch's tokens, [N, G], in their order there.

        Raises: RuntimeError if they are not those that were handed over.
        """
        places = micro_batch.target_RS[micro_batch.mask_RS]
        found = torch.searchsorted(self.place_N, places)
        if len(places) and (
            int(found.max()) == len(self.place_N) or not torch.equal(self.place_N[found], places)
        ):
            raise RuntimeError("the teacher's states are of other tokens than the micro-batch")
        return self.hidden_NG[found]


def copies_of_tokens(trajectories: Trajectories, mask_BT: Tensor, batching: Batching) -> Tensor:
    """Return which copy of a model has each token in the loss, [B, T] int64; -1 outside it.

    Copies are numbered as Layout.copy_rank does it. Cost: no collective; each rank cuts the whole
    batch, once for each of the ranks that share a sequence.
    """
    copy_BT = torch.full(mask_BT.shape, _NOWHERE)
    plan = batching.plan(trajectories.total_lengths_B.tolist())
    for dp_rank, packs in enumerate(plan):
        for rows, cp_rank in product(packs, range(batching.cp_size)):
            micro_batch = cut_rows(trajectories, mask_BT, batching, rows, cp_rank=cp_rank)
            places = micro_batch.target_RS[micro_batch.mask_RS]
            copy_BT.view(-1)[places] = dp_rank * batching.cp_size + cp_rank
    return copy_BT


def exchange(
    parts: Sequence[OwnHidden],
    student_copy_BT: Tensor,
    *,
    teacher: Layout,
    student: Layout,
    width: int,
    dtype: torch.dtype,
) -> Handed:
    """Return the states of the tokens of this rank's copy of the student. Called by all ranks.

    parts: of consecutive sequences of the batch. student_copy_BT: of the whole batch.
    Memory: on a rank that speaks for a copy of the teacher, its tokens' states twice for a moment;
    on one that speaks for a copy of the student, its tokens' states until they are dropped.
    Cost: one all_to_all over the job, in which each token's state travels once: 2 G bytes in bf16.
    """
    columns = student_copy_BT.shape[1]
    teacher_copy_BT = torch.cat(
        [
            torch.nn.functional.pad(
                part.copy_BT, (0, columns - part.copy_BT.shape[1]), value=_NOWHERE
            )
            for part in parts
        ]
    )
    teacher_copies, student_copies = teacher_copy_BT.flatten(), student_copy_BT.flatten()
    sent = torch.zeros(0, width, dtype=dtype)
    targets = sources = places = torch.zeros(0, dtype=torch.int64)
    if teacher.speaks_for_model:
        own = [part.hidden_NG for part in parts if part.hidden_NG is not None]
        sent = torch.cat([sent, *own])
        targets = student_copies[teacher_copies == teacher.copy_rank]
        sent = sent[targets.argsort(stable=True)]
    if student.speaks_for_model:
        places = (student_copies == student.copy_rank).nonzero()[:, 0]
        sources = teacher_copies[places]
    received = torch.empty(len(places), width, dtype=dtype, device=student.device)
    dist.all_to_all_single(
        received,
        sent.to(teacher.device),
        output_split_sizes=_counts(sources, teacher),
        input_split_sizes=_counts(targets, student),
    )
    hidden_NG = torch.empty(len(places), width, dtype=dtype)
    hidden_NG[sources.argsort(stable=True)] = received.cpu()
    return Handed(place_N=places, hidden_NG=hidden_NG, width=columns)


def _counts(copies: Tensor, layout: Layout) -> list[int]:
    """Return how many tokens each rank of the job has of those that are with these copies."""
    counts = [0] * dist.get_world_size()
    for copy, count in enumerate(torch.bincount(copies).tolist()):
        counts[layout.speaker_of(copy)] = count
    return counts
