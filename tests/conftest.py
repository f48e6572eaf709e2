"""The job of one rank that tests of models share; they alone pay for importing Megatron."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from poweropd_megatron.parallel.layout import Layout


@pytest.fixture(scope="session")
def layout() -> "Iterator[Layout]":
    """Yield the layout of a job of one rank, on the GPU if there is one."""
    from support.one_rank import joined

    with joined() as layout:
        yield layout
