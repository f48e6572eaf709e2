"""Fixtures of the tests that need process groups; they alone pay for importing Megatron."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")
if TYPE_CHECKING:
    from poweropd_megatron.parallel.layout import Layout

EXAMPLE = Path(__file__).parents[2] / "examples" / "chain_sum"


@pytest.fixture(scope="session")
def student_folder() -> Path:
    """Return the bundled student's folder."""
    return EXAMPLE / "student"


@pytest.fixture(scope="session")
def teacher_folder() -> Path:
    """Return the bundled teacher's folder."""
    return EXAMPLE / "teacher"


@pytest.fixture(scope="session")
def layout() -> "Iterator[Layout]":
    """Yield the layout of a job of one rank, joined as a run joins it.

    One thread: on a busy machine a second one spends its time waiting for the first.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from poweropd_megatron.config.schema import ParallelConfig
    from poweropd_megatron.parallel.layout import student_layout
    from poweropd_megatron.parallel.world import start

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
