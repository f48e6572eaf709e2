"""Seeded bugs in the CUDA kernels, so that the tests of them are known to notice some."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import ptx_backend, simt_backend

REASONS = [reason for reason in (simt_backend.why_not(), ptx_backend.why_not()) if reason]


@pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))
@pytest.mark.timeout(900)
def test_every_seeded_bug_is_noticed() -> None:
    script = Path(__file__).with_name("mutations.py")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
