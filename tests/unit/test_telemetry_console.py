import io
import re

import pytest
from rich.console import Console as Terminal

from poweropd_megatron.telemetry.console import Console

METRICS = {
    "reward/mean": -0.01234,
    "grad_norm": 0.3211,
    "response_length/mean": 14.25,
    "tokens_per_second": 12345.6,
}
EVALUATION = {
    "eval/greedy_accuracy": 0.41,
    "eval/greedy_accuracy_se": 0.014,
    "eval/avg@4": 0.392,
    "eval/pass@4": 0.6,
    "eval/response_length": 13.25,
    "eval/truncation_rate": 0.05,
    "eval/math500/greedy_accuracy": 0.3,
    "loss": 1.0,
}
SUMMARY = {
    "steps": 20,
    "train_seconds": 125.0,
    "grad_norm": {"median": 0.32, "max": 1.11},
    "before": {"greedy_accuracy": 0.41, "greedy_accuracy_se": 0.014, "response_length": 13.0},
    "after": {"greedy_accuracy": 0.84, "response_length": 12.5},
    "export": "runs/x/export",
}


def unstamped(text: str) -> list[str]:
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  "
    lines = text.splitlines()
    assert all(re.match(stamp, line) for line in lines)
    return [re.sub(stamp, "", line, count=1) for line in lines]


@pytest.fixture
def log_path(tmp_path):
    return tmp_path / "train.log"


def run(console, tmp_path):
    with console:
        console.info("student [bold]has[/] 131,000 parameters\nteacher too")
        console.start(0)
        console.evaluation(0, EVALUATION)
        for step in range(1, 21):
            console.phase("rollout")
            console.step(step, METRICS if step != 20 else {})
        console.warning("reward is 0 everywhere")
        console.finish(SUMMARY, tmp_path)


def test_without_a_terminal_the_output_is_the_plain_lines_of_the_log(log_path, tmp_path, capsys):
    run(Console(log_path, total_steps=20, log_interval=7), tmp_path)
    output = capsys.readouterr().out
    assert output == log_path.read_text()
    lines = unstamped(output)
    assert lines[:5] == [
        "student [bold]has[/] 131,000 parameters",
        "teacher too",
        "training for 20 steps",
        "evaluation after step 0: greedy accuracy 41.0 % ± 1.4, avg@4 39.2 %, pass@4 60.0 %, "
        "mean length (tokens) 13.2, truncated 5.0 %",
        "evaluation after step 0, math500: greedy accuracy 30.0 %",
    ]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split("  left")[0] for line in steps] == [
        "step 7/20  reward/mean -0.01234  grad_norm 0.3211  response_length/mean 14.25  "
        "tokens_per_second 12,346  accuracy 41.0 % ± 1.4",
        "step 14/20  reward/mean -0.01234  grad_norm 0.3211  response_length/mean 14.25  "
        "tokens_per_second 12,346  accuracy 41.0 % ± 1.4",
        "step 20/20  reward/mean -  grad_norm -  response_length/mean -  "
        "tokens_per_second -  accuracy 41.0 % ± 1.4",
    ]
    assert "WARNING: reward is 0 everywhere" in lines


def test_the_end_says_what_improved_how_long_it_took_and_where_things_are(
    log_path, tmp_path, capsys
):
    run(Console(log_path, total_steps=20, log_interval=1), tmp_path)
    lines = [re.sub(" +", " ", line.strip()) for line in unstamped(capsys.readouterr().out)]
    assert lines[lines.index("WARNING: reward is 0 everywhere") + 1 :] == [
        "finished 20 steps in 2 min 5 s; gradient norm: median 0.32, max 1.11",
        "before after change",
        "greedy accuracy 41.0 % ± 1.4 84.0 % +43.0",
        "mean length (tokens) 13.0 12.5 -0.5",
        "export runs/x/export",
        f"report {tmp_path}/report.html",
        f"metrics {tmp_path}/metrics.jsonl",
        f"checkpoints {tmp_path}/checkpoints",
    ]


def test_a_resumed_run_appends_to_the_log(log_path):
    for done in (0, 5):
        with Console(log_path, total_steps=10, log_interval=1) as console:
            console.start(done)
    assert unstamped(log_path.read_text()) == [
        "training for 10 steps",
        "training for 10 steps, going on after step 5",
    ]


def test_a_terminal_shows_progress_and_keeps_step_lines_for_the_log(log_path, tmp_path):
    screen = io.StringIO()
    terminal = Terminal(file=screen, force_terminal=True, width=160)
    run(Console(log_path, total_steps=20, log_interval=5, terminal=terminal), tmp_path)
    shown = screen.getvalue()
    assert "step 20/20" in shown
    assert "rollout" in shown
    assert "[bold]has[/]" in shown
    assert "step 5/20  reward/mean" not in shown
    assert "step 5/20  reward/mean -0.01234" in log_path.read_text()
    assert "\x1b" not in log_path.read_text()


def test_an_exception_closes_the_live_display_and_is_logged(log_path):
    screen = io.StringIO()
    terminal = Terminal(file=screen, force_terminal=True, width=160)
    show_cursor = "\x1b[?25h"
    console = Console(log_path, total_steps=2, log_interval=1, terminal=terminal)

    def fail_after_start():
        with console:
            console.start(0)
            assert show_cursor not in screen.getvalue()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail_after_start()
    assert show_cursor in screen.getvalue()
    assert unstamped(log_path.read_text())[-1] == "ended by ValueError: broken"


def test_a_summary_with_nothing_in_it_is_said_with_dashes(log_path, tmp_path, capsys):
    with Console(log_path, total_steps=2, log_interval=1) as console:
        console.finish({"before": None, "export": None}, tmp_path)
    lines = unstamped(capsys.readouterr().out)
    assert lines[0] == "finished - steps in -; gradient norm: median -, max -"
    assert lines[1].split() == ["export", "-"]
