"""Puts the tests' shared code on the path."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """On a busy machine a second thread spends its time waiting for the first."""
    torch.set_num_threads(1)
