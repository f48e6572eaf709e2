"""How the batch of one model is cut into micro-batches: from the lengths, for all ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.world import own_rows
from poweropd_megatron.train.packing import Packs, plan_packs


@dataclass(frozen=True, kw_only=True)
class Batching:
    """The settings of one model, and what its layout asks of micro-batches.

    length_multiple: what the positions of a row must be a multiple of; cp_size: ranks that share
    each sequence, for which a packed one is padded to a multiple of twice that.
    num_microbatches_multiple: what each rank's number of micro-batches must be a multiple of.
    """

    micro_batch_size: int
    max_tokens_per_microbatch: int | None
    dp_size: int
    length_multiple: int
    cp_size: int = 1
    num_microbatches_multiple: int = 1

    @classmethod
    def of(
        cls,
        layout: Layout,
        *,
        micro_batch_size: int,
        max_tokens_per_microbatch: int | None,
        num_microbatches_multiple: int = 1,
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
            num_microbatches_multiple=num_microbatches_multiple,
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
            num_packs_multiple=self.num_microbatches_multiple,
        )

    def _plan_padded(self, lengths: Sequence[int]) -> list[Packs]:
        plan: list[Packs] = []
        for rank in range(self.dp_size):
            rows = own_rows(len(lengths), rank=rank, size=self.dp_size).tolist()
            rows.sort(key=lambda row: -lengths[row])
            starts = range(0, len(rows), self.micro_batch_size)
            plan.append([rows[start : start + self.micro_batch_size] for start in starts])
        multiple = self.num_microbatches_multiple
        most = -(-max(map(len, plan)) // multiple) * multiple
        return [packs + [[] for _ in range(most - len(packs))] for packs in plan]

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
