"""The student's model chunks under Megatron's DistributedDataParallel.

With overlap_param_gather the ranks' shares of the new weights are sent while the run goes on, and
waited for where a layer needs them.
"""

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.models.megatron_settings import fields_of


def wrap(chunks: Sequence[GPTModel], config: TrainConfig) -> list[DistributedDataParallel]:
    """Return a rank's chunks with their gradient buffers, and tell Megatron's schedules of them."""
    fields = fields_of(DistributedDataParallelConfig, config.student.megatron)
    ddps = [
        DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
                grad_reduce_in_fp32=True,
                align_param_gather=fields.get("overlap_param_gather", False),
                **fields,
            ),
            chunk,
            # Only what the first chunk sends at the end of the backward is waited for.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]
    schedule = chunks[0].config
    schedule.finalize_model_grads_func = finalize_model_grads
    if fields.get("overlap_grad_reduce"):
        no_sync = [ddp.no_sync for ddp in ddps]
        schedule.no_sync_func = no_sync if len(ddps) > 1 else no_sync[0]
    head = chunks[-1].output_layer.weight if chunks[-1].post_process else None
    if head is not None and fields.get("overlap_grad_reduce"):
        _show_gradient(head)
    if head is not None and fields.get("overlap_param_gather"):
        _make_last_norm_wait(ddps[-1], head)
    return ddps


def start_param_gather(ddps: Sequence[DistributedDataParallel]) -> None:
    """Send off the weights that this rank updated, if overlap_param_gather left that to us.

    Every rank does so at once, so that those with nothing to generate keep no other waiting.
    """
    for ddp in ddps:
        if ddp.ddp_config.overlap_param_gather:
            ddp.start_param_sync()


def finish_param_gather(ddps: Sequence[DistributedDataParallel]) -> None:
    """Wait until this rank has all weights: before they are read other than by a forward."""
    for ddp in ddps:
        if ddp.ddp_config.overlap_param_gather:
            for bucket_group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
                bucket_group.finish_param_sync(skip_next_bucket_dispatch=True)


def _show_gradient(head: Tensor) -> None:
    """Let Megatron see a gradient of the head's own weight, without which it sends nothing.

    The real one is in main_grad when backward comes here; this is a zero that takes no memory, and
    that Megatron doesn't add.
    """
    zero = head.new_zeros(()).expand_as(head)

    def show(_: Any) -> None:
        if head.grad is None:
            head.grad, head.grad_added_to_main_grad = zero, True  # type: ignore[attr-defined]

    head.expand_as(head).grad_fn.next_functions[0][0].register_prehook(show)  # type: ignore


def _make_last_norm_wait(ddp: DistributedDataParallel, head: Tensor) -> None:
    """Let the last norm wait for the head's own weight too, whose module is never called."""
    bucket_group = ddp.param_to_bucket_group[head]

    def wait(*_: Any) -> None:
        bucket_group.finish_param_sync(skip_next_bucket_dispatch=True)

    ddp.module.decoder.final_layernorm.register_forward_pre_hook(wait)
