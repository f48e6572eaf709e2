"""What a comparison says while its runs go on."""

import io
import json

import pytest
from rich.console import Console
from support.made_comparison import finish, read_recipe, records

from poweropd_megatron.comparison import progress
from poweropd_megatron.comparison.plan import planned_runs
from poweropd_megatron.comparison.progress import ComparisonProgress


@pytest.fixture
def clock(monkeypatch):
    """Return a clock whose first entry is the time."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_says_what_a_run_came_to_and_what_is_left(tmp_path, clock):
    runs = planned_runs(read_recipe(tmp_path))
    finish(runs[0], records(0.4, 0.55))
    said = io.StringIO()
    with ComparisonProgress(
        num_runs=9, num_waiting=4, jobs=2, terminal=Console(file=said, width=200)
    ) as voice:
        voice.started(runs[0])
        voice.started(runs[1])
        clock[0] += 80
        voice.waited(runs[:2])
        voice.ended(runs[0], None)
        voice.ended(runs[1], "exit code 2: out of luck")
    assert said.getvalue().splitlines() == [
        "[6/9] log_ratio seed 1 finished in 1 min 20 s: greedy accuracy 40.0 % → 55.0 %; "
        "about 2 min 40 s left",
        "[7/9] power_1 seed 1 FAILED after 1 min 20 s: exit code 2: out of luck",
    ]


def test_a_terminal_shows_the_steps_of_each_run_also_of_one_that_has_none_yet(tmp_path, clock):
    runs = planned_runs(read_recipe(tmp_path))
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with ComparisonProgress(num_runs=4, num_waiting=4, jobs=2, terminal=terminal) as voice:
        voice.started(runs[0])
        voice.started(runs[1])
        runs[0].folder.mkdir(parents=True)
        lines = [json.dumps({"step": step}) for step in range(4)]
        (runs[0].folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"st')
        clock[0] += 5
        voice.waited(runs[:2])
        shown = {task.description: (task.completed, task.total) for task in voice._bars.tasks}
        assert shown == {"log_ratio seed 1": (3, 4), "power_1 seed 1": (0, 4)}
        voice.ended(runs[0], "it broke")
        assert [task.description for task in voice._bars.tasks] == ["power_1 seed 1"]
