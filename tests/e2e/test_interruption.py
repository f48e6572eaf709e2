"""Ctrl-C and SIGTERM: one line, the exit code of the signal, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.cli_run import ended, settings, start, steps_recorded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SAID = "interrupted after step {}; {}; run the same command again to go on"


def wait_until_recorded(folder, step, script):
    deadline = time.monotonic() + 120
    while step not in steps_recorded(folder):
        assert script.poll() is None, "\n".join(script.communicate())
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupted(arguments, folder, *, after, send):
    """Return the run's last line after `send` was called on it in the step after `after`."""
    script = start(arguments, world_size=2)
    wait_until_recorded(folder, after, script)
    send(script)
    said = ended(script)
    assert said.codes == [128 + (signal.SIGINT if send is press_ctrl_c else signal.SIGTERM)]
    assert "Traceback" not in said.stderr
    command, *rest = [line for line in said.stderr.splitlines() if not line.startswith("[setup")]
    assert "torchrun.py" in command
    assert rest == []
    assert said.stdout.count("  interrupted after") == 1
    last = said.stdout.splitlines()[-1]
    assert (folder / "train.log").read_text().splitlines()[-1] == last
    return last.partition("  ")[2]


def press_ctrl_c(script):
    os.killpg(script.pid, signal.SIGINT)


def terminate_the_launcher(script):
    script.terminate()


@pytest.mark.parametrize(
    ("tp", "changes"),
    [(2, ()), (1, ("--teacher.num_ranks=1", "--rollout.num_parts=2"))],
    ids=["TP2", "a-teacher-on-a-rank-of-its-own"],
)
def test_a_run_is_interrupted_in_one_line_and_goes_on_by_the_same_command(tmp_path, tp, changes):
    folder = tmp_path / "run"
    arguments = settings(folder, "--data.eval_files=[]", "--eval.interval=0", steps=60, tp=tp)
    arguments += ["--optimizer.lr_decay_iters=60", *changes]
    said = interrupted(arguments, folder, after=2, send=press_ctrl_c)
    last = max(steps_recorded(folder))
    assert last < 4, "it went on after the signal"
    assert said == SAID.format(last, "no checkpoint yet")

    said = interrupted(arguments, folder, after=5, send=terminate_the_launcher)
    last = max(steps_recorded(folder))
    assert last < 8, "it went on after the signal"
    assert said == SAID.format(last, "checkpoint of step 4 is there")

    resumed = ended(start([*arguments, "--train_steps=8"], world_size=2)).expect(0)
    assert "training for 8 steps, going on after step 4" in resumed.stdout
    assert steps_recorded(folder) == list(range(9))


def test_a_run_that_has_not_begun_is_interrupted_without_a_traceback(tmp_path):
    script = start(settings(tmp_path / "run", tp=2), world_size=2)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / ".lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    press_ctrl_c(script)
    said = ended(script)
    assert said.codes == [130]
    assert "Traceback" not in said.stderr
    everything = said.stdout + said.stderr
    assert everything.count("interrupted by") + everything.count("interrupted after") == 1


def test_a_rank_that_waits_for_the_others_ends_at_once():
    """It waits in C, where no exception can be raised."""
    code = """
from poweropd_megatron.interruption import raising
from poweropd_megatron.parallel import world

join = world.dist.init_process_group

def tell_and_join(*args, **kwargs):
    print("waiting", flush=True)
    join(*args, **kwargs)

world.dist.init_process_group = tell_and_join
with raising(), world.joined(timeout_minutes=5):
    pass
"""
    first = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | first
    ) as rank:
        assert rank.stdout.readline() == b"waiting\n"
        with pytest.raises(subprocess.TimeoutExpired):
            rank.wait(timeout=2)
        rank.terminate()
        try:
            assert rank.wait(timeout=20) == -signal.SIGTERM
        finally:
            rank.kill()
