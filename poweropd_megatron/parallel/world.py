"""The ranks of the job: starting, agreeing on errors, sharing rows."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from poweropd_megatron.errors import UserError
from poweropd_megatron.interruption import Interrupted, ending_at_once
from poweropd_megatron.parallel import cpu_device


def start(*, timeout_minutes: float) -> torch.device:
    """Return this rank's device, after joining the job: NCCL with a GPU a rank, gloo on CPUs."""
    if torch.cuda.is_available():
        # Megatron's overlap of tensor-parallel communication with GEMMs relies on this order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        cpu_device.install()
        backend = "gloo"
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost")):
        os.environ.setdefault(name, default)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    with ending_at_once():  # It waits for the other ranks, up to the timeout.
        dist.init_process_group(
            backend,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    return device


@contextmanager
def joined(*, timeout_minutes: float) -> Iterator[torch.device]:
    """Join the job for the length of the block, and give this rank's device."""
    device = start(timeout_minutes=timeout_minutes)
    try:
        yield device
    except Interrupted:
        raise  # The other ranks may have gone already; leaving the group would wait for them.
    except BaseException:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()


def hush_libraries() -> None:
    """Keep to themselves what Megatron and torch say at import of optional packages and old names.

    A rank prints some twenty such lines before its first step; errors still come through.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.")
    for name in ("megatron.core", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def agreed[T](step: Callable[[], T]) -> T:
    """Return what `step` returns; if it raised a UserError on any rank, raise that on all.

    Without it, an error on some ranks would leave the others waiting in their next collective. For
    the same reason `step` must have no collective of its own after what can fail.
    Cost: one all_gather_object.
    """
    result: T | None = None
    error: UserError | None = None
    try:
        result = step()
    except UserError as raised:
        error = raised
    errors = _of_all_ranks(error)
    for rank, found in enumerate(errors):
        if found is not None:
            if errors.count(None) == 0:
                raise found
            raise type(found)(f"{found} (on rank {rank})")
    return result  # type: ignore[return-value]


def on_first_rank(step: Callable[[], None]) -> None:
    """Call `step` on rank 0; if it raised a UserError, raise that on all ranks as it is.

    Cost: one all_gather_object.
    """
    error: UserError | None = None
    if dist.get_rank() == 0:
        try:
            step()
        except UserError as raised:
            error = raised
    found = _of_all_ranks(error)[0]
    if found is not None:
        raise found


def _of_all_ranks(error: UserError | None) -> list[UserError | None]:
    errors: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return errors


def share_rows(
    rows: Tensor, indices: Tensor, shape: tuple[int, ...], *, speaks: bool, device: torch.device
) -> Tensor:
    """Return, on every rank, the whole tensor whose rows the speaking ranks hold; on the CPU.

    Shapes: rows [len(indices), ...] where `speaks`; indices of these rows in the result; result
    `shape`. Each value must come from one speaking rank: exact, as the others add zero, those too
    that share a row by context parallelism.
    Cost: one all_reduce of the result over all ranks, whatever the model's layout.
    """
    whole = torch.zeros(shape, dtype=rows.dtype, device=device)
    if speaks:
        whole[indices.to(device)] = rows.to(device)
    dist.all_reduce(whole)
    return whole.cpu()


def told_by_first_rank(values: Tensor, *, device: torch.device) -> Tensor:
    """Return rank 0's values on every rank, on the CPU; the others bring a tensor of that shape.

    Cost: one broadcast.
    """
    told = values.to(device)
    dist.broadcast(told, src=0)
    return told.cpu()


def largest(values: Tensor, *, device: torch.device) -> Tensor:
    """Return the largest of all ranks' values, element by element, on the CPU of every rank.

    Cost: one all_reduce.
    """
    most = values.to(device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.cpu()


def own_rows(num_rows: int, *, rank: int, size: int) -> Tensor:
    """Return the indices of the rows that share `rank` of `size` has."""
    return torch.arange(num_rows).tensor_split(size)[rank]


def most_rows(num_rows: int, *, ranks: range, size: int) -> int:
    """Return the most rows that one of these shares of `size` has."""
    return max(len(own_rows(num_rows, rank=rank, size=size)) for rank in ranks)
