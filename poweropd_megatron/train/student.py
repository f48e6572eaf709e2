"""The student: weights, Megatron's DDP and optimizer, and the policy-gradient step.

Shapes: B sequences, T tokens, N tokens of a micro-batch in the loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.models.build import TORCH_DTYPES, build_model
from poweropd_megatron.models.finite import check_finite
from poweropd_megatron.models.megatron_settings import fields_of
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.scoring import RewardedTokens, policy_gradient_of_chosen
from poweropd_megatron.objectives.labels import Labels
from poweropd_megatron.objectives.rewards import Reward
from poweropd_megatron.ops.fused_policy_gradient import PolicyGradient
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.world import share_rows, told_by_first_rank
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.batching import Batching
from poweropd_megatron.train.ddp import finish_param_gather, start_param_gather, wrap
from poweropd_megatron.train.microbatches import MicroBatch, cut_batch, rows_of

_ADVICE = (
    "the weights were not changed. Lower optimizer.lr, set optimizer.clip_grad, or try "
    "objective.kind = 'power'"
)


@dataclass(frozen=True, kw_only=True)
class StudentOutcome:
    """What one update did, the same on every rank.

    Shapes: logp_BT and entropy_BT fp32 on the CPU, 0 outside the loss.
    """

    logp_BT: Tensor
    entropy_BT: Tensor
    grad_norm: float
    learning_rate: float


class Student:
    """A model that learns: DistributedDataParallel, Megatron's Adam and learning-rate schedule.

    On ranks without the student it has no chunks, no optimizer and no schedule.
    """

    def __init__(self, config: TrainConfig, model: ModelConfig, layout: Layout) -> None:
        """Load the student's shards and build the optimizer over them.

        Raises: InputError if the folder's tensors don't fit.
        """
        self.layout = layout
        self.vocab_size = model.vocab_size
        self._head = config.objective.head
        self._logits_dtype = TORCH_DTYPES[config.objective.logits_dtype]
        self.chunks = build_model(
            model,
            layout,
            folder=config.student.path,
            dtype=config.student.dtype,
            setting="student.path",
            megatron=config.student.megatron,
        )
        self.batching = Batching.of(
            layout,
            micro_batch_size=config.micro_batch_size,
            max_tokens_per_microbatch=config.max_tokens_per_microbatch,
            num_microbatches_multiple=self.chunks[0].config.microbatch_group_size_per_vp_stage
            if len(self.chunks) > 1
            else 1,
        )
        self._ddps: list[DistributedDataParallel] = []
        if layout.holds_model:
            self._ddps = wrap(self.chunks, config)
            self.optimizer, self.schedule = _build_optimizer(config, self._ddps)
            start_param_gather(self._ddps)
        else:
            _join_building_of_optimizer()

    def finish_param_gather(self) -> None:
        """Wait for the weights that are still on their way; before they are saved or replaced."""
        finish_param_gather(self._ddps)

    def update(
        self,
        trajectories: Trajectories,
        labels: Labels,
        teacher_logp_BT: Tensor,
        reward: Reward,
    ) -> StudentOutcome:
        """Return the outcome of one forward, backward and optimizer step over the whole batch.

        Called by all ranks of the job; those without the student only learn what came of it.
        log p_S comes out of the forward that is differentiated, so the reward is never stale. Each
        rank works on its data-parallel share; the gradient is that of the mean over all tokens in
        the loss of the global batch.
        Raises: NonFiniteError on every rank, before the weights change, if a log-prob or the
        gradient isn't finite.
        """
        holds_model = self.layout.holds_model
        micro_batches: list[MicroBatch] = []
        results: list[tuple[MicroBatch, PolicyGradient]] = []
        if holds_model:
            micro_batches = cut_batch(
                trajectories,
                labels.mask_BT,
                self.batching,
                dp_rank=self.layout.dp_rank,
                cp_rank=self.layout.cp_rank,
            )
            for ddp in self._ddps:
                ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            results = get_forward_backward_func()(
                forward_step_func=partial(
                    self._forward_step,
                    labels=labels,
                    teacher_logp_BT=teacher_logp_BT,
                    reward=reward,
                ),
                data_iterator=[iter(micro_batches) for _ in self._ddps],
                model=self._ddps,
                num_microbatches=len(micro_batches),
                seq_length=trajectories.token_ids_BT.shape[1],
                micro_batch_size=self.batching.micro_batch_size,
            )
        rows = rows_of(micro_batches)
        logp_BT, entropy_BT = self._collect(results, rows, trajectories.token_ids_BT.shape)
        check_finite("log-probs of the student", logp_BT, _ADVICE)
        facts = torch.zeros(2, dtype=torch.float64)
        if holds_model:
            self.optimizer.prepare_grads()
            facts[0] = float(self.optimizer.get_grad_norm())
            facts[1] = self.optimizer.param_groups[0]["lr"]
        grad_norm, learning_rate = told_by_first_rank(facts, device=self.layout.device)
        check_finite("gradient norm", grad_norm, _ADVICE)
        if holds_model:
            self.optimizer.step()
            start_param_gather(self._ddps)
            self.schedule.step(increment=1)
        return StudentOutcome(
            logp_BT=logp_BT,
            entropy_BT=entropy_BT,
            grad_norm=float(grad_norm),
            learning_rate=float(learning_rate),
        )

    def _forward_step(
        self,
        micro_batches: Iterator[MicroBatch],
        ddp: DistributedDataParallel,
        *,
        labels: Labels,
        teacher_logp_BT: Tensor,
        reward: Reward,
    ) -> tuple[Any, Any]:
        """Return the model's output and its loss function, as Megatron's schedules ask for them."""
        micro_batch = next(micro_batches)
        chosen = micro_batch.chosen(
            labels.student_BT,
            vocab_size=self.vocab_size,
            tp_group=self.layout.groups.tp,
            logits_dtype=self._logits_dtype,
            device=self.layout.device,
        )
        teacher_logp_N = micro_batch.cut(teacher_logp_BT)[micro_batch.mask_RS]
        output = ddp(
            input_ids=micro_batch.token_ids_RS.to(self.layout.device),
            position_ids=None,
            attention_mask=None,
            packed_seq_params=micro_batch.packed_seq_params,
            output_processor=policy_gradient_of_chosen,
            output_processor_context=RewardedTokens(
                chosen=chosen,
                teacher_logp_N=teacher_logp_N.to(self.layout.device),
                reward=reward,
                head=self._head,
            ),
        )

        def loss(
            result: PolicyGradient,
        ) -> tuple[Tensor, Tensor, tuple[MicroBatch, PolicyGradient]]:
            num_tokens = torch.tensor(
                len(result.logp_N), dtype=torch.int, device=result.logp_N.device
            )
            return result.loss, num_tokens, (micro_batch, result)

        return output, loss

    def _collect(
        self,
        results: list[tuple[MicroBatch, PolicyGradient]],
        rows: Tensor,
        shape: torch.Size,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies of the whole batch, on every rank."""
        both = torch.zeros(2, *shape)
        for micro_batch, result in results:
            micro_batch.put(both[0], result.logp_N)
            micro_batch.put(both[1], result.entropy_N)
        shared = share_rows(
            both[:, rows].transpose(0, 1),
            rows,
            (shape[0], 2, shape[1]),
            speaks=self.layout.speaks_for_model,
            device=self.layout.device,
        )
        return shared[:, 0], shared[:, 1]


def _join_building_of_optimizer() -> None:
    """Take part, without weights, in what get_megatron_optimizer exchanges among all ranks.

    megatron-core 0.19.2 makes parameter groups alike over the whole job: those of the weights
    outside experts, then those of experts.
    """
    for _ in range(2):
        groups: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(groups, [])


def _build_optimizer(
    config: TrainConfig, ddps: list[DistributedDataParallel]
) -> tuple[Any, OptimizerParamScheduler]:
    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=config.student.dtype == "bf16",
            params_dtype=TORCH_DTYPES[config.student.dtype],
            use_distributed_optimizer=settings.use_distributed_optimizer,
            **fields_of(OptimizerConfig, config.student.megatron),
        ),
        ddps,
    )
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=settings.lr_decay_iters or config.train_steps,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, schedule
