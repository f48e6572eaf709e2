"""A job of one rank, in the process that runs the tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.parallel.layout import Layout, student_layout
from poweropd_megatron.parallel.world import start


@contextmanager
def joined() -> Iterator[Layout]:
    """Yield the layout, joined as a run joins it; leaving the block ends the job.

    One thread: on a busy machine a second one spends its time waiting for the first.
    """
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("MASTER_ADDR", "localhost"),
            ("MASTER_PORT", "0"),
        ):
            environment.setenv(name, value)
        device = start(timeout_minutes=2)
    torch.set_num_threads(1)
    yield student_layout(ParallelConfig(), device, seed=1)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
