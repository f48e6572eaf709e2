"""The pool of ranks itself: what it returns, how failures are told, and that nothing is left."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import GRACE_SECONDS, RankError, RankPool

SLACK_SECONDS = 30.0
"""What a busy machine may add to a time limit."""


def rank_and_sum(number: int) -> tuple[int, int, int]:
    total = torch.tensor(number + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), int(total)


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a marked error")
    dist.barrier()


def die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def hang_on_rank_1() -> int:
    if dist.get_rank() == 1:
        time.sleep(600)
    return os.getpid()


def return_what_cannot_be_pickled() -> object:
    return lambda: None


def note_pid_and_hang(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    dist.barrier()
    if dist.get_rank() == 0:
        time.sleep(600)
    dist.barrier()


def test_results_come_in_rank_order_for_any_world_size(ranks: RankPool) -> None:
    for world_size in (2, 1, 4):
        results = ranks.run(rank_and_sum, 10, world_size=world_size)
        total = 10 * world_size + sum(range(world_size))
        assert results == [(rank, world_size, total) for rank in range(world_size)]


def test_an_error_is_told_with_rank_and_traceback_while_others_wait(ranks: RankPool) -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks.run(fail_on_rank_1, world_size=2)
    assert time.monotonic() - start < GRACE_SECONDS + SLACK_SECONDS
    first, second = str(caught.value).split("fail_on_rank_1, rank 1 of 2: ")
    assert "rank 0 of 2: no answer within 3 s of rank 1's failure; it was at" in first
    assert "dist.barrier()" in first or "in fail_on_rank_1" in first
    assert second.startswith("Traceback")
    assert "ValueError: a marked error" in second


def test_a_dead_rank_is_told_with_its_exit_code(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="rank 0 of 2: died with exit code 7"):
        ranks.run(die_on_rank_0, world_size=2)


def test_a_rank_that_hangs_is_told_with_where_it_is(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(hang_on_rank_1, world_size=2, timeout_seconds=5)
    assert "rank 1 of 2: no answer within 5 s; it was at" in str(caught.value)
    assert "hang_on_rank_1" in str(caught.value).rpartition("it was at")[2]
    assert "rank 0" not in str(caught.value)


def test_a_result_that_cannot_be_sent_is_an_error(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 0 of 1: Traceback(.|\n)*pickle"):
        ranks.run(return_what_cannot_be_pickled, world_size=1)


def test_failures_leave_no_process_and_the_next_call_works(ranks: RankPool) -> None:
    for function in (fail_on_rank_1, die_on_rank_0):
        with pytest.raises(RankError):
            ranks.run(function, world_size=2)
        assert multiprocessing.active_children() == []
    assert ranks.run(rank_and_sum, 0, world_size=2) == [(0, 2, 1), (1, 2, 1)]


def test_ranks_end_when_the_session_is_killed(tmp_path: Path) -> None:
    script = (
        "from support.rank_pool import RankPool; import test_rank_pool as t\n"
        "pool = RankPool(['test_rank_pool'])\n"
        f"pool.run(t.note_pid_and_hang, {str(tmp_path)!r}, world_size=2)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    session = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}
    )
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        pids = [int(file.name) for file in tmp_path.iterdir()]
        assert all(is_running(pid) for pid in pids)
    finally:
        session.send_signal(signal.SIGKILL)
        session.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
