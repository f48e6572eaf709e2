import json
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from support.html_page import Page

from poweropd_megatron.cli.main import main
from poweropd_megatron.errors import InputError
from poweropd_megatron.objectives.diagnostics import (
    reward_by_position,
    reward_histogram,
    reward_map,
    reward_metrics,
    reward_surface,
)
from poweropd_megatron.telemetry import figures, report, reward_figures
from poweropd_megatron.telemetry.report import write_report
from poweropd_megatron.telemetry.sinks import JsonlSink, write_json_atomically

NUM_STEPS = 100
CONFIG = """train_steps = 200
student = { path = "/data/Qwen/Qwen3-0.6B-Base" }
teacher = { path = "Qwen/Qwen3-4B" }
objective = { kind = "power", alpha = 5.0, terminal = "mask" }  # <b>
optimizer = { clip_grad = 1.0 }
"""


def evaluation(accuracy: float) -> dict[str, float]:
    values = {
        "greedy_accuracy": accuracy,
        "greedy_accuracy_se": 0.0123,
        "avg@4": accuracy - 0.05,
        "avg@4_se": 0.01,
        "response_length": 10 + 10 * accuracy,
        "eos_rate": 0.9,
    }
    return {
        f"eval/{source}{key}": value for source in ("", "gsm/") for key, value in values.items()
    }


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    teacher, student = -3 * torch.rand(2, 8, 50, generator=generator)
    return (5 * teacher).exp() - (5 * student).exp(), teacher, student


def sample(step: int, prompt: str, response: str, *, correct: bool) -> dict[str, object]:
    record = {"step": step, "source": "gsm", "prompt": prompt, "response": response}
    return record | {"answer": "14", "correct": correct, "finish": "length"}


def write_run(folder: Path) -> Path:
    metrics = JsonlSink(folder / "metrics.jsonl")
    diagnostics = JsonlSink(folder / "diagnostics.jsonl")
    samples = JsonlSink(folder / "samples.jsonl")
    metrics.write({"step": 0} | evaluation(0.41))
    mask, starts = torch.ones(8, 50, dtype=torch.bool), torch.zeros(8, dtype=torch.long)
    for step in range(1, NUM_STEPS + 1):
        reward, teacher, student = batch(step)
        record = {
            "step": step,
            "grad_norm": 0.25 if step != 50 else 4.0,
            "entropy": 0.5,
            "response_length/mean": 14.0,
            "rollout/eos_rate": 0.9,
            "rollout/truncation_rate": 0.1,
            "time/rollout_seconds": 3.0,
            "time/teacher_seconds": 0.5,
            "time/student_seconds": 0.5,
            "time/step_seconds": 4.0,
            "tokens_per_second": 1234.0,
        }
        record |= reward_metrics(reward.flatten(), teacher.flatten(), student.flatten())
        if step % 50 == 0:
            record |= evaluation(0.41 + step / 250)
        metrics.write(record)
    for step in (10, 100):
        reward, teacher, student = batch(step)
        by_position = reward_by_position(reward, mask, starts)
        by_probability = reward_map(reward.flatten(), teacher.flatten(), student.flatten())
        diagnostics.write(
            {
                "step": step,
                "reward_by_position": by_position,
                "reward_histogram": reward_histogram(reward.flatten()),
                "reward_map": by_probability,
                "reward_surface": reward_surface(lambda a, b: (5 * a).exp() - (5 * b).exp()),
            }
        )
    samples.write(sample(0, "a<b", "<script>alert(1)</script>&", correct=False))
    samples.write(sample(50, "a<b", "in between", correct=False))
    samples.write(sample(100, "a<b", "a#14", correct=True))
    samples.write(sample(100, "new prompt", "x" * 100_000, correct=False))
    (folder / "config.toml").write_text(CONFIG)
    write_json_atomically(folder / "summary.json", {"steps": NUM_STEPS, "train_seconds": 400.0})
    return folder


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("run"))).read_text()


def read(run_dir) -> Page:
    return Page(write_report(run_dir).read_text())


def test_a_finished_run_has_its_numbers_and_every_figure(html):
    page = Page(html)
    assert "Qwen/Qwen3-0.6B-Base learns from Qwen/Qwen3-4B" in page.words
    assert "On-policy distillation. Objective: power, alpha 5, terminal mask." in page.words
    assert "100 steps, finished." in page.words
    assert page.after("100 steps, finished.", 10) == [
        "41.0 % → 81.0 %", "greedy accuracy", "0.25", "median grad norm", "4", "largest grad norm",
        "6 min 40 s", "training time", "1,234", "tokens per second",
    ]  # fmt: skip
    assert page.after("All files", 8) == [
        "held-out prompts", "step 0", "step 100", "change (points, tokens)",
        "greedy accuracy", "41.0 % ± 1.2", "81.0 % ± 1.2", "+40.0",
    ]  # fmt: skip
    assert page.after("mean length (tokens)", 3) == ["14.1", "18.1", "+4.0"]
    assert "gsm" in page.words
    assert page.tags.count("svg") == page.tags.count("figure") == 13
    assert "Not recorded." in page.after("new prompt", 3)
    assert page.words.count("Not recorded.") == 1


def test_samples_of_the_first_and_last_evaluation_stand_side_by_side_escaped(html):
    page = Page(html)
    assert page.after("a<b", 8) == [
        "Step 0", "wrong", "truncated", "<script>alert(1)</script>&",
        "Step 100", "right", "truncated", "a#14",
    ]  # fmt: skip
    assert "script" not in page.tags
    assert "in between" not in page.words
    assert any("94000 characters left out" in words for words in page.words)


def test_the_page_stands_alone_and_is_small(html):
    assert len(html.encode()) < 1_500_000
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', html)
    assert links
    assert all((first or second).startswith("#") for first, second in links)
    assert "@import" not in html


def test_ids_are_unique_and_every_reference_resolves(html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)) != set()
    for first, second in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html):
        assert (first or second) in ids


def test_figures_use_the_colours_of_the_page(html):
    assert "#0a00" not in html
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert {"ink", "series-1", "series-4"} < used
    assert used <= set(re.findall(r"--([\w-]+):", html))


def test_the_same_records_give_the_same_bytes_and_matplotlib_keeps_its_settings(run_dir):
    before = dict(matplotlib.rcParams)
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("missing", ["diagnostics.jsonl", "samples.jsonl", "config.toml"])
def test_a_missing_file_is_a_note(run_dir, missing):
    (run_dir / missing).unlink()
    notes = [words for words in read(run_dir).words if words.startswith("Not recorded")]
    assert len(notes) > 1 or notes[0] != "Not recorded."


def test_a_run_under_way_is_said_to_be(run_dir):
    (run_dir / "summary.json").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "grad_no')
    page = read(run_dir)
    assert "100 of 200 steps, not finished." in page.words
    assert "6 min 40 s" in page.words


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 0} | evaluation(0.4)],
        [{"step": 1}],
        [{"step": 1, "grad_norm": None, "reward/mean": None, "tokens_per_second": None}],
        [{"step": 1, "grad_norm": 0.0, "reward/mean": 0.0}],
        [{"step": 1, "time/rollout_seconds": 0.0}, {"step": 2, "time/rollout_seconds": 1.0}],
    ],
)
def test_the_first_moments_of_a_run_have_a_report(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "diagnostics.jsonl").write_text(
        '{"step": 1, "reward_by_position": {"edges": [0], "mean": [], "min": [], "max": [], '
        '"count": []}, "reward_map": {"edges": [0, 1], "count": [[0]], "mean": [[null]]}}\n'
    )
    page = read(tmp_path)
    assert page.tags.count("figure") == 13
    assert "student not recorded learns from teacher not recorded" in page.words


def test_one_evaluation_is_before_and_not_after(tmp_path):
    JsonlSink(tmp_path / "metrics.jsonl").write({"step": 0} | evaluation(0.4))
    page = read(tmp_path)
    assert page.after("step 0", 2) == ["not yet", "change (points, tokens)"]
    assert page.after("change (points, tokens)", 4) == ["greedy accuracy", "40.0 % ± 1.2", "-", "-"]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["summary.json", "config.toml", "samples.jsonl"])
def test_a_malformed_file_is_named(run_dir, name):
    (run_dir / name).write_text("= {\n{}\n")
    with pytest.raises(InputError, match=re.escape(name)):
        write_report(run_dir)


@pytest.mark.parametrize("output", ["nowhere/report.html", "taken", "", "config.toml/report.html"])
def test_a_place_that_cannot_be_written_is_refused_in_one_line(
    run_dir, output, monkeypatch, capsys
):
    (run_dir / "taken").mkdir()
    monkeypatch.chdir(run_dir)
    monkeypatch.setattr(report, "render_page", None)
    before = sorted(run_dir.iterdir())
    assert main(["report", ".", "--output", output]) == 2
    shown = output or "."
    assert capsys.readouterr().err == (
        f"poweropd: error: --output: {shown} can't be written; name a file in a folder that you "
        "can write to\n"
    )
    assert sorted(run_dir.iterdir()) == before


@pytest.mark.parametrize("name", ["grad_norm", "eval/greedy_accuracy"])
@pytest.mark.parametrize("value", ["x", [1.0], {}])
def test_a_metric_that_is_no_number_is_named(run_dir, name, value, capsys):
    JsonlSink(run_dir / "metrics.jsonl").write({"step": NUM_STEPS + 1, name: value})
    assert main(["report", str(run_dir)]) == 2
    assert capsys.readouterr().err == (
        f"poweropd: error: {run_dir / 'metrics.jsonl'}, line {NUM_STEPS + 2}: {name} must be a "
        f"number or null, as runs write it, not {value!r}; mend or delete the line\n"
    )


def test_shares_of_time_are_of_the_whole_run():
    records = [{"step": 1, "time/rollout_seconds": 3.0, "time/student_seconds": 1.0}]
    records += [{"step": 2, "time/student_seconds": 2.0, "time/eval_seconds": 2.0}]
    svg = figures.time_per_phase(records)
    assert re.findall(r">(\w+ \d+ %)<", svg) == ["rollout 38 %", "student 38 %", "eval 25 %"]


def test_a_long_curve_keeps_its_extremes():
    records = [{"step": step, "grad_norm": 1.0} for step in range(10_000)]
    records[5000]["grad_norm"] = 1e6
    assert "1e+06" in figures.gradient_norm(records, None)
    assert len(figures.gradient_norm(records, None)) < 40_000


def test_a_reward_that_is_never_finite_is_not_drawn():
    nan_cell = {"edges": [0, 0.5, 1], "count": [[3, 0], [0, 0]], "mean": [[None, None]] * 2}
    assert "<svg" in reward_figures.reward_map([{"step": 1, "reward_map": nan_cell}])
    assert figures.reward([{"step": 1, "reward/mean": None}]) is None
