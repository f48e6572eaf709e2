"""Shares of rows, and a job of one rank; tests/distributed has the jobs of several."""

import json
import os
import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from poweropd_megatron.environment import world_size
from poweropd_megatron.parallel.world import own_rows

ALONE = """
import json
import torch
import torch.distributed as dist
from poweropd_megatron.errors import InputError
from poweropd_megatron.parallel import world

device = world.start(timeout_minutes=1)
try:
    world.agreed(lambda: (_ for _ in ()).throw(InputError("alone")))
except InputError as error:
    text = str(error)
rows = torch.tensor([[2.5], [7.5]])
shared = world.share_rows(rows, torch.tensor([1, 0]), (2, 1), speaks=True, device=device)
print(json.dumps({
    "device": str(device),
    "backend": dist.get_backend(),
    "text": text,
    "result": world.agreed(lambda: 5),
    "shared": shared.tolist(),
}))
"""


@given(num_rows=st.integers(0, 50), size=st.integers(1, 12))
def test_shares_are_contiguous_disjoint_complete_and_even(num_rows: int, size: int) -> None:
    shares = [own_rows(num_rows, rank=rank, size=size) for rank in range(size)]
    assert torch.equal(torch.cat(shares), torch.arange(num_rows))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_the_world_size_is_torchruns(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() is None
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert world_size() == 16


def test_one_rank_starts_without_torchrun_and_needs_nobody() -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    run = subprocess.run(
        [sys.executable, "-c", ALONE],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "device": "cpu",
        "backend": "gloo",
        "text": "alone",
        "result": 5,
        "shared": [[7.5], [2.5]],
    }
