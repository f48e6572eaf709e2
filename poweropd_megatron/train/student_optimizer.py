"""Megatron's Adam and learning-rate schedule over the student's weights."""

from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.models.build import TORCH_DTYPES
from poweropd_megatron.models.megatron_settings import fields_of


def build_optimizer(
    config: TrainConfig, ddps: list[DistributedDataParallel]
) -> tuple[Any, OptimizerParamScheduler]:
    """Return the optimizer and its schedule. Called by all ranks of the student.

    The schedule counts optimizer steps: as many for each step of the run as it has mini-batches.
    """
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
    per_step = config.global_batch_size // (config.mini_batch_size or config.global_batch_size)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters * per_step,
        lr_decay_steps=(settings.lr_decay_iters or config.train_steps) * per_step,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, schedule


def join_building_of_optimizer() -> None:
    """Take part, without weights, in what get_megatron_optimizer exchanges among all ranks.

    megatron-core 0.19.2 makes parameter groups alike over the whole job: those of the weights
    outside experts, then those of experts.
    """
    for _ in range(2):
        groups: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(groups, [])
