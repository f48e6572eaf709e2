"""Runs side by side: slots, failures, interruption, and the processes that make them."""

import signal
import subprocess
import sys

import psutil
import pytest
from support.made_comparison import finish, read_recipe, records

from poweropd_megatron.cli.main import main
from poweropd_megatron.comparison import command, pool
from poweropd_megatron.comparison.plan import planned_runs, write_configs
from poweropd_megatron.output_dir import locked

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


class Heard:
    """A listener that remembers."""

    def __init__(self):
        self.running, self.most, self.order = 0, 0, []

    def started(self, run):
        self.running += 1
        self.most = max(self.most, self.running)
        self.order.append(run.name)

    def ended(self, _run, _error):
        self.running -= 1

    def waited(self, running):
        assert len(running) == self.running


def process(*program, code=0, log=None):
    return subprocess.Popen(
        program or [sys.executable, "-c", f"import sys; sys.exit({code})"],
        start_new_session=True,
        stdout=log,
    )


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.02)
    runs = planned_runs(read_recipe(tmp_path))
    write_configs(runs)
    return runs


def test_no_more_than_jobs_run_at_once_and_a_failure_stops_no_other(runs):
    slots = []

    def start(run, slot):
        slots.append(slot)
        if run is runs[1]:
            run.log_path.write_text("step 1\npoweropd: error: it broke\nrank 0 ended\n\n")
            return process(code=2)
        if run is runs[2]:
            run.log_path.write_text("Traceback\nKeyError: 'x'\n")
            return process("/bin/sh", "-c", "kill -9 $$")
        finish(run, records(0.1, 0.2))
        return process()

    heard = Heard()
    outcomes = pool.run_side_by_side(runs, jobs=2, start=start, listener=heard)
    assert list(outcomes.values()).count(None) == 2
    assert outcomes[runs[1]] == "exit code 2: it broke"
    assert outcomes[runs[2]] == "SIGKILL: KeyError: 'x'"
    assert heard.order == [run.name for run in runs]
    assert (heard.most, set(slots)) == (2, {0, 1})


def test_a_run_that_ends_well_without_finishing_has_failed(runs):
    runs[0].log_path.write_text("")
    outcomes = pool.run_side_by_side(runs[:1], jobs=1, start=lambda *_: process(), listener=Heard())
    assert outcomes[runs[0]] == "exit code 0: it said nothing"


def test_whatever_ends_the_comparison_ends_its_runs(runs):
    started = []

    def start(*_):
        if len(started) == 1:
            raise KeyboardInterrupt
        started.append(process(*SLEEP))
        return started[0]

    with pytest.raises(KeyboardInterrupt):
        pool.run_side_by_side(runs, jobs=2, start=start, listener=Heard())
    assert started[0].poll() == -signal.SIGTERM


def test_runs_end_with_a_comparison_that_is_killed():
    """The kernel tells them, since nothing else can."""
    program = (
        "import os, signal\n"
        "from poweropd_megatron import interruption\n"
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen({SLEEP!r}, preexec_fn=interruption.end_with_parent)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_run_is_a_train_command_by_torchrun_for_several_ranks(runs):
    one = pool.command_of(runs[0], ranks=1)
    assert one[1:] == ["-m", "poweropd_megatron.cli.main", "train", "--config", one[-1]]
    assert one[-1] == str(runs[0].config_path)
    two = pool.command_of(runs[0], ranks=2)
    assert two[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert two[5:] == one[1:]


def test_each_slot_has_gpus_of_its_own_while_there_are_enough(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    environments = [
        pool.environment_of(slot, ranks=2, threads=4, devices=["0", "2", "4"]) for slot in range(2)
    ]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["0,2", "4,0"]
    assert {each["OMP_NUM_THREADS"] for each in environments} == {"4"}
    assert "RANK" not in environments[0]


def test_a_failed_run_ends_the_command_with_1_after_the_table_and_is_tried_again(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(command.figures, "figures", lambda _: {})
    recipe = read_recipe(tmp_path)
    attempts = []

    def start(run, _slot):
        attempts.append(run.name)
        run.log_path.write_text("poweropd: error: out of luck\n")
        if run.name == "power_1 seed 1" and attempts.count(run.name) == 1:
            return process(code=2)
        finish(run, records(0.1, 0.2))
        return process()

    assert command.compare(recipe, start=start) == 1
    said = capsys.readouterr().out
    assert "power_1 seed 1 FAILED" in said
    assert "exit code 2: out of luck" in said
    assert "| power_1 (1 of 2 runs) |" in said
    assert "[4/4] " in said
    assert command.compare(recipe, start=start) == 0
    assert attempts.count("power_1 seed 1") == 2
    assert len(attempts) == 5
    assert "runs: 4 (2 methods x 2 seeds), finished before: 3;" in capsys.readouterr().out


def test_torchrun_around_a_comparison_is_refused(tmp_path, capsys, monkeypatch):
    read_recipe(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "--config", str(tmp_path / "recipe.toml")]) == 2
    assert "run it without torchrun" in capsys.readouterr().err


def test_two_comparisons_do_not_share_a_folder(tmp_path, capsys):
    recipe = read_recipe(tmp_path)

    with locked(recipe.output_dir):
        assert main(["compare", "--config", str(tmp_path / "recipe.toml")]) == 2
    assert "another run is writing to" in capsys.readouterr().err
