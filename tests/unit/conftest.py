"""The bundled models, and no deadline on machines that are busy with other things."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "chain_sum"


@pytest.fixture(scope="session")
def student_folder() -> Path:
    """Return the bundled student's folder."""
    return EXAMPLE / "student"


@pytest.fixture(scope="session")
def teacher_folder() -> Path:
    """Return the bundled teacher's folder."""
    return EXAMPLE / "teacher"
