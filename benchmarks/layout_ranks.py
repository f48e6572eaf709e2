"""A function on ranks of its own, and the time that a rank waits for communication."""

import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ("poweropd_megatron.train.build",)
"""What the ranks are forked with: importing Megatron takes seconds."""


def on_ranks(function: Callable[..., dict[str, Any]], *args: Any, world_size: int) -> Any:
    """Return what the function returned on rank 0, through JSON; the ranks are gone afterwards.

    Raises: torch.multiprocessing.ProcessRaisedException with a rank's traceback.
    """
    # Megatron warns at import, and again in each rank, of what it doesn't find.
    os.environ["PYTHONWARNINGS"] = "ignore"
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        torch.multiprocessing.start_processes(
            _be_rank,
            args=(world_size, folder, function, args),
            nprocs=world_size,
            start_method="forkserver",
        )
        return json.loads(Path(folder, "result.json").read_text())


def _be_rank(
    rank: int,
    world_size: int,
    folder: str,
    function: Callable[..., dict[str, Any]],
    args: tuple[Any, ...],
) -> None:
    from poweropd_megatron.parallel import cpu_device

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder, "store")), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    cpu_device.install()
    result = function(*args)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


class Waited:
    """Seconds that this rank has waited for communication."""

    seconds = 0.0


@contextmanager
def waiting_timed() -> Iterator[Waited]:
    """Count, inside the block, what this rank waits in collectives, sends and receives.

    Over gloo each of them is started in no time and then waited for: at once by a call that
    blocks, later by one that was asked not to. What goes on meanwhile isn't counted.
    """
    waited = Waited()
    wait = dist.Work.wait

    def timed(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return wait(work, *args, **kwargs)
        finally:
            waited.seconds += time.perf_counter() - begin

    dist.Work.wait = timed
    try:
        yield waited
    finally:
        dist.Work.wait = wait
