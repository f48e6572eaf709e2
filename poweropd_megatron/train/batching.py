"""How the batch of one model is cut into micro-batches: from the lengths, for all ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.world import own_rows
from poweropd_megatron.train.packing import Packs, plan_packs


@dataclass(frozen=True, kw_only=True)
class Batching:
    """The settings of one model, and what its layout asks of micro-batches.

    length_multiple: what the positions of a row must be a multiple of; cp_size: ranks that share
    each sequence, for which a packed one is padded to a multiple of twice that.
    group_size, num_stages: of Megatron's interleaved schedule, which takes micro-batches in groups
    of group_size, the last one at least as many as stages; 1 and 1 for any other schedule.
    """

    micro_batch_size: int
    max_tokens_per_microbatch: int | None
    dp_size: int
    length_multiple: int
    cp_size: int = 1
    group_size: int = 1
    num_stages: int = 1

    @classmethod
    def of(
        cls,
        layout: Layout,
        *,
        micro_batch_size: int,
        max_tokens_per_microbatch: int | None,
        group_size: int = 1,
        num_stages: int = 1,
    ) -> "Batching":
        """Return how the settings cut a batch in a layout.

        Sequence parallelism pads the positions of a rank to TP; context parallelism those of a row
        to two slices for each rank.
        """
        of_rank = layout.tp_size if layout.parallel.sequence_parallel else 1
        if layout.cp_size > 1:
            of_rank = math.lcm(of_rank, 2)
        return cls(
            micro_batch_size=micro_batch_size,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            dp_size=layout.dp_size,
            length_multiple=of_rank * layout.cp_size,
            cp_size=layout.cp_size,
            group_size=group_size,
            num_stages=num_stages,
        )

    @classmethod
    def of_student(cls, layout: Layout, config: TrainConfig) -> "Batching":
        """Return how a run's batch is cut for training.

        It is the same on ranks that hold no part of the student: they plan with the others.
        """
        parallel, given = config.student.parallel, config.student.megatron
        num_stages = group_size = 1
        if parallel.virtual_pipeline_model_parallel_size is not None:
            num_stages = parallel.pipeline_model_parallel_size
            group_size = given.get("microbatch_group_size_per_vp_stage") or num_stages
        return cls.of(
            layout,
            micro_batch_size=config.micro_batch_size,
            max_tokens_per_microbatch=config.max_tokens_per_microbatch,
            group_size=group_size,
            num_stages=num_stages,
        )

    @property
    def is_packed(self) -> bool:
        """Return True if the sequences of a micro-batch lie end to end in one row."""
        return self.max_tokens_per_microbatch is not None

    def plan(self, lengths: Sequence[int]) -> list[Packs]:
        """Return each rank's micro-batches, as numbers of sequences: equally many on all ranks.

        Right-padded: a rank has a contiguous share, of which sequences of like length go together,
        micro_batch_size at a time. Packed: see plan_packs; the budget counts all padding. In both
        forms the last ones of a rank may be empty.
        """
        if self.max_tokens_per_microbatch is None:
            return self._plan_padded(lengths)
        budget = self.max_tokens_per_microbatch // self.length_multiple * self.length_multiple
        return plan_packs(
            [self.padded_length(length) for length in lengths],
            max_tokens=max(budget, 1),
            num_ranks=self.dp_size,
            round_up=self.scheduled,
        )

    def _plan_padded(self, lengths: Sequence[int]) -> list[Packs]:
        plan: list[Packs] = []
        for rank in range(self.dp_size):
            rows = own_rows(len(lengths), rank=rank, size=self.dp_size).tolist()
            rows.sort(key=lambda row: -lengths[row])
            starts = range(0, len(rows), self.micro_batch_size)
            plan.append([rows[start : start + self.micro_batch_size] for start in starts])
        most = self.scheduled(max(map(len, plan)))
        return [packs + [[] for _ in range(most - len(packs))] for packs in plan]

    def scheduled(self, count: int) -> int:
        """Return the smallest number of micro-batches, from this one, that the schedule takes."""
        count = max(count, self.group_size)
        last = count % self.group_size
        return count + self.num_stages - last if 0 < last < self.num_stages else count

    def padded_length(self, length: int) -> int:
        """Return the positions that a packed sequence takes."""
        multiple = 1 if self.cp_size == 1 else 2 * self.cp_size
        return -(-length // multiple) * multiple

    def input_shape(self, lengths: Sequence[int]) -> tuple[int, int]:
        """Return the rows and positions of the input that holds sequences of these lengths; under
        context parallelism its positions on all ranks.

        An empty micro-batch has a few positions of padding: a rank that has nothing left to compute
        takes part in the others' collectives all the same. They are at least two, as of any
        sequence, for attention kernels take a single one as a step of decoding, or not at all.
        """
        packed = sum(self.padded_length(length) for length in lengths)
        needed = packed if self.is_packed else max(lengths, default=0)
        width = -(-max(needed, 2) // self.length_multiple) * self.length_multiple
        return (1 if self.is_packed else max(len(lengths), 1)), width

    def padding_fraction(self, batches: Sequence[Sequence[int]]) -> float:
        """Return which share of the positions that the model computes for all batches is padding.

        Each batch is its sequences' lengths.
        """
        shapes = [
            self.input_shape([lengths[row] for row in rows])
            for lengths in batches
            for packs in self.plan(lengths)
            for rows in packs
        ]
        return 1 - sum(map(sum, batches)) / sum(rows * width for rows, width in shapes)

    def oversized(self, lengths: Sequence[int]) -> list[int]:
        """Return the positions, with padding, of each sequence that takes more of them than
        max_tokens_per_microbatch: such a sequence is a micro-batch by itself."""
        if self.max_tokens_per_microbatch is None:
            return []
        positions = (self.input_shape([length])[1] for length in lengths)
        return [width for width in positions if width > self.max_tokens_per_microbatch]
