"""Three updates of the tiny student on fixed trajectories, in a layout.

Shapes: B sequences, T tokens, U updates.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from gathering import gather_shares, whole_tensors
from support.made_trajectories import make
from torch import Tensor

from poweropd_megatron.config.objective import KINDS
from poweropd_megatron.config.ranks import student_ranks, teacher_ranks
from poweropd_megatron.config.schema import (
    DataConfig,
    DType,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.teacher_head import load_teacher_head
from poweropd_megatron.objectives.labels import Labels, label
from poweropd_megatron.objectives.sampled.power import power_reward
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import student_layout, teacher_layout
from poweropd_megatron.rollout.megatron_engine import MegatronRolloutEngine
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.step_metrics import step_metrics
from poweropd_megatron.train.student import Student
from poweropd_megatron.train.student_outcome import StudentOutcome
from poweropd_megatron.train.teacher import Teacher
from poweropd_megatron.train.teacher_hidden import Handed

NUM_UPDATES = 3
ALPHA = 1.0
TEACHER_EOS = 39
"""A token of the teacher's alone."""
OPTIMIZER = OptimizerConfig(
    lr=2e-3,
    min_lr=5e-4,
    lr_decay_style="linear",
    weight_decay=0.1,
    clip_grad=0.05,
    adam_eps=1e-3,
)
"""Clips; adam_eps is near the gradients, so that one of a wrong scale shows in the weights."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table of layouts."""

    name: str
    world_size: int
    student: ParallelConfig
    teacher: ParallelConfig
    micro_batch_size: int = 2
    max_tokens_per_microbatch: int | None = None
    use_distributed_optimizer: bool = True
    head: Literal["fused", "recompute", "materialized"] = "fused"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """All but objective.head."""
    mini_batch_size: int | None = None
    megatron: dict[str, Any] = field(default_factory=dict)
    """student.megatron."""
    teacher_ranks: int | None = None
    """teacher.num_ranks."""
    offload: bool = False
    """teacher.offload."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the updates came to; per-token values are 0 outside the loss.

    gradients are those of the first update before clipping, weights those after the last, under
    Hugging Face names, with every copy of a tensor that several ranks hold; padding has the rows
    of both beyond the vocabulary.
    """

    teacher_logp_BT: Tensor
    logp_UBT: Tensor
    entropy_UBT: Tensor
    loss_U: Tensor
    grad_norm_U: Tensor
    gradients: dict[str, list[Tensor]]
    weights: dict[str, list[Tensor]]
    padding: list[Tensor]


def fixed_trajectories() -> Trajectories:
    """Return five ragged sequences: three end with a stop token, two were cut off."""
    stop = 36
    return make(
        [
            ([0, 18, 19], [stop, 7, 7, 2, stop]),
            ([30], [5, 1, 22, 17, 18, 19, 20, 35, 0]),
            ([8, 8, 25, 3, 31, 12], [stop]),
            ([21, 4], [33, 6, 14, 27, 9, 1, 18]),
            ([11, 29, 10, 16], [19, 23, 0, 34, 26, stop]),
        ],
        eos=stop,
    )


def fixed_labels(trajectories: Trajectories) -> Labels:
    """Return labels that differ between the models: the teacher is scored on its own EOS."""
    return label(trajectories, "cross_eos", teacher_eos_id=TEACHER_EOS)


def masked_labels(trajectories: Trajectories, first_percent: float = 100.0) -> Labels:
    """Return labels without the final EOS: one of those that can be compared with all tokens."""
    return label(trajectories, "mask", teacher_eos_id=TEACHER_EOS, first_percent=first_percent)


@dataclass(frozen=True, kw_only=True)
class Models:
    """A student and a teacher in their layouts, and the batch of the updates."""

    student: Student
    student_model: ModelConfig
    teacher: Teacher
    trajectories: Trajectories
    labels: Labels

    def ask_teacher(self) -> Tensor | Handed:
        """Return the teacher's log-probs, or what an objective over the vocabulary needs of it."""
        if self.student.vocabulary_objective is None:
            return self.teacher.score(self.trajectories, self.labels)
        own = self.teacher.hidden_own(self.trajectories, self.labels)
        copy_BT = self.student.copies_of_tokens(self.trajectories, self.labels)
        return self.teacher.hand_over([own], self.student.layout, copy_BT)

    def update(self, teacher: Tensor | Handed) -> StudentOutcome:
        """Return the outcome of one update, with the power reward of drawn tokens."""
        return self.student.update(
            self.trajectories, self.labels, teacher, partial(power_reward, alpha=ALPHA)
        )

    def gather(self, value_of: Callable[[Any], Tensor]) -> dict[str, list[Tensor]]:
        """Return every copy of the student's tensors, see whole_tensors."""
        return whole_tensors(self.student.chunks, self.student.layout, self.student_model, value_of)


def build_models(
    row: Row,
    student_folder: str,
    teacher_folder: str,
    dtype: DType,
    optimizer: OptimizerConfig,
    trajectories: Trajectories | None = None,
) -> Models:
    """Return the models of this rank, and the batch: the fixed trajectories unless given."""
    cpu_device.install()
    config = TrainConfig(
        output_dir="unused",
        train_steps=NUM_UPDATES,
        global_batch_size=5,
        mini_batch_size=row.mini_batch_size,
        micro_batch_size=row.micro_batch_size,
        max_tokens_per_microbatch=row.max_tokens_per_microbatch,
        student=StudentConfig(
            path=student_folder, dtype=dtype, parallel=row.student, megatron=row.megatron
        ),
        teacher=TeacherConfig(
            path=teacher_folder,
            dtype=dtype,
            parallel=row.teacher,
            micro_batch_size=2,
            max_tokens_per_microbatch=row.max_tokens_per_microbatch,
            num_ranks=row.teacher_ranks,
            offload=row.offload,
        ),
        objective=replace(row.objective, head=row.head),
        optimizer=replace(optimizer, use_distributed_optimizer=row.use_distributed_optimizer),
        data=DataConfig(train_files=["unused"]),
    )
    layout = student_layout(
        row.student,
        torch.device("cpu"),
        seed=1,
        ranks=student_ranks(config, dist.get_world_size()),
    )
    of_teacher = teacher_layout(
        row.teacher, layout, ranks=teacher_ranks(config, dist.get_world_size())
    )
    student_model = read_model_config(student_folder, setting="student.path")
    teacher_model = read_model_config(teacher_folder, setting="teacher.path")
    trajectories = trajectories or fixed_trajectories()
    is_exact = KINDS[row.objective.kind].family == "exact"
    teacher_head = None
    if is_exact:
        teacher_head = load_teacher_head(teacher_model, layout, folder=teacher_folder, dtype=dtype)
    return Models(
        student=Student(config, student_model, layout, teacher_head=teacher_head),
        student_model=student_model,
        teacher=Teacher(config.teacher, teacher_model, of_teacher, logits_dtype="fp32"),
        trajectories=trajectories,
        labels=masked_labels(trajectories, row.objective.window_first_percent)
        if is_exact
        else fixed_labels(trajectories),
    )


def update_on_ranks(
    row: Row,
    student_folder: str,
    teacher_folder: str,
    dtype: DType = "fp32",
    trajectories: Trajectories | None = None,
) -> Measured:
    """Return what this rank saw of the updates in a layout."""
    models = build_models(row, student_folder, teacher_folder, dtype, OPTIMIZER, trajectories)
    student = models.student
    gradients: list[dict[str, list[Tensor]]] = []

    def finalize_and_record(
        finalize_model_grads: Callable[..., None], model: list[Any], *args: Any, **kwargs: Any
    ) -> None:
        finalize_model_grads(model, *args, **kwargs)
        if row.use_distributed_optimizer:
            gather_shares((ddp.buffers for ddp in model), student.layout.groups.dp_cp)
            gather_shares(
                (ddp.expert_parallel_buffers for ddp in model), student.layout.groups.expt_dp
            )
        gradients.append(models.gather(lambda weight: weight.main_grad))

    if student.layout.holds_model:
        schedule = student.chunks[0].config
        schedule.finalize_model_grads_func = partial(
            finalize_and_record, schedule.finalize_model_grads_func
        )
    _roll_out(student)
    teacher = models.ask_teacher()
    outcomes = [models.update(teacher) for _ in range(NUM_UPDATES)]
    teacher_logp_BT = outcomes[0].teacher_logp_BT
    student.finish_param_gather()
    weights = models.gather(lambda weight: weight)
    first = gradients[0] if student.layout.holds_model else {"padding": []}
    logp_UBT = torch.stack([outcome.logp_BT for outcome in outcomes])
    batch = (models.trajectories, models.labels, teacher_logp_BT)
    return Measured(
        teacher_logp_BT=teacher_logp_BT,
        logp_UBT=logp_UBT,
        entropy_UBT=torch.stack([outcome.entropy_BT for outcome in outcomes]),
        loss_U=_loss(logp_UBT, teacher_logp_BT, models.labels)
        if outcomes[0].loss_BT is None
        else torch.tensor(
            [step_metrics(*batch, outcome, ratio=None)["loss"] for outcome in outcomes]
        ),
        grad_norm_U=torch.tensor([outcome.grad_norm for outcome in outcomes]),
        padding=first.pop("padding") + weights.pop("padding"),
        gradients=first,
        weights=weights,
    )


def _roll_out(student: Student) -> None:
    """Generate a little, as a run does before each update: that must leave nothing behind."""
    engine = MegatronRolloutEngine(
        student.chunks,
        student.layout,
        vocab_size=student.vocab_size,
        stop_token_ids=[],
        micro_batch_size=2,
        seed=1,
        logits_dtype=torch.float32,
        cuda_graph=True,
    )
    engine.generate(
        [[1, 2, 3], [4], [5, 6]], Sampling(max_new_tokens=3), stream=(0,), weight_version=0
    )


def _loss(logp_UBT: Tensor, teacher_logp_BT: Tensor, labels: Labels) -> Tensor:
    """Return the mean of -reward * log p_S over the tokens in the loss, for each update."""
    student_UN = logp_UBT[:, labels.mask_BT].double()
    teacher_N = teacher_logp_BT[labels.mask_BT].double()
    return -((teacher_N.exp() - student_UN.exp()) * student_UN).mean(dim=1)
