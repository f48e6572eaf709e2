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
    """Yield the layout of a job of one rank, joined as a run joins it."""
    from support.one_rank import joined

    with joined() as layout:
        yield layout
