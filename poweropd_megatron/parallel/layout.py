"""Which ranks do what for one model: its process groups and this rank's place in them."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from poweropd_megatron.config.schema import ParallelConfig

_GRID_DIMS = ["tp", "cp", "dp", "pp"]
_GRID_GROUPS = {
    "tp": ["tp"],
    "cp": ["cp"],
    "dp": ["dp"],
    "pp": ["pp"],
    "mp": ["tp", "pp"],
    "tp_cp": ["tp", "cp"],
    "dp_cp": ["dp", "cp"],
}
_EXPERT_DIMS = ["tp", "ep", "dp", "pp"]
_EXPERT_GROUPS = {
    "expt_tp": ["tp"],
    "ep": ["ep"],
    "expt_dp": ["dp"],
    "tp_ep": ["tp", "ep"],
    "tp_ep_pp": ["tp", "ep", "pp"],
}
"""Experts cut a pipeline stage's ranks anew: tensor ranks (always one), expert ranks, copies."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """This rank's place in one model's process groups: the student's or the teacher's.

    `ranks` hold the model. On the others of the job, which have no groups and no place, the sizes
    and `holds_model` can still be asked for.
    """

    parallel: ParallelConfig
    ranks: range
    groups: ProcessGroupCollection
    device: torch.device

    @property
    def holds_model(self) -> bool:
        """Return True if this rank has a part of the model."""
        return dist.get_rank() in self.ranks

    @property
    def tp_rank(self) -> int:
        """Return which shard of each layer this rank holds."""
        return dist.get_rank(self.groups.tp)

    @property
    def tp_size(self) -> int:
        """Return how many ranks share each layer."""
        return self.parallel.tensor_model_parallel_size

    @property
    def pp_rank(self) -> int:
        """Return which pipeline stage this rank is."""
        return dist.get_rank(self.groups.pp)

    @property
    def pp_size(self) -> int:
        """Return the number of pipeline stages."""
        return self.parallel.pipeline_model_parallel_size

    @property
    def dp_rank(self) -> int:
        """Return which share of the batch this rank's model copy trains on or scores."""
        return dist.get_rank(self.groups.dp)

    @property
    def dp_size(self) -> int:
        """Return the number of shares of the batch."""
        return len(self.ranks) // self.parallel.model_parallel_size

    @property
    def cp_rank(self) -> int:
        """Return which slices of its share's sequences this rank's model copy works on."""
        return dist.get_rank(self.groups.cp)

    @property
    def cp_size(self) -> int:
        """Return how many model copies share a sequence."""
        return self.parallel.context_parallel_size

    @property
    def copy_rank(self) -> int:
        """Return which copy of the model this rank belongs to: those of a share follow another."""
        return dist.get_rank(self.groups.dp_cp)

    @property
    def num_copies(self) -> int:
        """Return the number of model copies, each of which generates by itself."""
        return self.dp_size * self.cp_size

    @property
    def ep_rank(self) -> int:
        """Return which share of the experts this rank holds."""
        return dist.get_rank(self.groups.ep)

    @property
    def ep_size(self) -> int:
        """Return how many ranks share the experts."""
        return self.parallel.expert_model_parallel_size

    @property
    def copies_in_step(self) -> range:
        """Return the model copies that run each forward together with this rank's, as they share
        experts: a layer sends tokens to all ranks that hold some."""
        count = max(1, self.ep_size // self.tp_size)
        first = self.copy_rank // count * count
        return range(first, first + count)

    @property
    def is_first_stage(self) -> bool:
        """Return True where the embedding is."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Return True where the LM head is."""
        return self.pp_rank == self.pp_size - 1

    @property
    def speaks_for_model(self) -> bool:
        """Return True on one rank of each model copy: the first that sees the head's results."""
        return self.holds_model and self.is_last_stage and self.tp_rank == 0

    @property
    def speaker(self) -> int:
        """Return the global rank that speaks for this rank's model copy."""
        last_stage = dist.get_process_group_ranks(self.groups.pp)[-1]
        return last_stage - self.tp_rank

    def speaker_of(self, copy: int) -> int:
        """Return the global rank that speaks for a model copy; known on all ranks of the job."""
        stages_before = self.num_copies * (self.pp_size - 1)
        return self.ranks[self.tp_size * (copy + stages_before)]


def student_layout(
    parallel: ParallelConfig, device: torch.device, *, seed: int, ranks: range | None = None
) -> Layout:
    """Return the student's layout over its ranks, after setting up Megatron's parallel state.

    Called by all ranks of the job; ranks: by default all, else those from 0 on.
    Order of ranks, as Megatron's default: tensor fastest, then context, data, pipeline.
    """
    ranks = ranks or range(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        rank_offset=ranks.start,
        local_world_size=len(ranks),
    )
    if dist.get_rank() in ranks:
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        groups = ProcessGroupCollection.use_mpu_process_groups()
    else:
        tensor_parallel.model_parallel_cuda_manual_seed(seed, tp_rank=0, ep_rank=0, etp_rank=0)
        groups = ProcessGroupCollection()
    return Layout(parallel=parallel, ranks=ranks, groups=groups, device=device)


def teacher_layout(
    parallel: ParallelConfig, student: Layout, *, ranks: range | None = None
) -> Layout:
    """Return the teacher's layout over its ranks, by default the student's.

    Called by all ranks of the job. It is the student's layout if both are cut alike.
    """
    ranks = ranks or student.ranks
    if ranks == student.ranks and parallel == student.parallel:
        return student
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context, expert = parallel.context_parallel_size, parallel.expert_model_parallel_size
    per_stage = len(ranks) // pipeline
    grid = HyperCommGrid(
        [tensor, context, per_stage // (tensor * context), pipeline],
        _GRID_DIMS,
        rank_offset=ranks.start,
        backend=dist.get_backend(),
    )
    grid.register_view(
        "expert", [1, expert, per_stage // expert, pipeline], _EXPERT_DIMS, shared_dims=["pp"]
    )
    groups = ProcessGroupCollection()
    for name, dims in _GRID_GROUPS.items():
        setattr(groups, name, grid.create_pg(dims))
    for name, dims in _EXPERT_GROUPS.items():
        setattr(groups, name, grid.create_pg(dims, view="expert"))
    groups.embd = groups.pos_embd = None
    return Layout(parallel=parallel, ranks=ranks, groups=groups, device=student.device)
