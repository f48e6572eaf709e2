"""A whole run by the launch script: what it says, what it writes, and what a second start does."""

import json
import math
import re
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.cli_run import metrics, records, settings, steps_recorded, train

from poweropd_megatron.checkpoint.store import MANIFEST_NAME, CheckpointStore, verify
from poweropd_megatron.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEP_METRICS = (
    *("loss", "grad_norm", "learning_rate", "entropy", "kl/student_teacher", "num_tokens"),
    *("reward/mean", "reward/std", "reward/min", "reward/max", "reward/p05", "reward/p95"),
    *(
        "reward/rms",
        "grad_norm_per_reward",
        "reward/dead_fraction",
        "response_length/mean",
        "response_length/max",
    ),
    *("rollout/eos_rate", "rollout/truncation_rate", "rollout/truncated_mass", "rollout/logp_gap"),
    *("student/padding_fraction", "teacher/padding_fraction"),
    *("time/rollout_seconds", "time/teacher_seconds", "time/student_seconds"),
    *("time/step_seconds", "tokens_per_second", "memory/peak_bytes"),
)
DIAGNOSTICS = ("reward_by_position", "reward_histogram", "reward_map", "reward_surface")
EVALUATION_METRICS = (
    *("eval/greedy_accuracy", "eval/greedy_accuracy_se", "eval/avg@2", "eval/avg@2_se"),
    *("eval/pass@2", "eval/pass@2_se", "eval/response_length", "eval/eos_rate"),
    *("eval/truncation_rate", "eval/answer_failures"),
)


def everything_in(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return when each file of a folder was written, and its bytes."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_the_launch_script_runs_two_processes_and_returns_0(tp2):
    assert tp2.ended.codes == [0]
    assert "--nproc-per-node=2" in tp2.ended.stderr.splitlines()[0]
    assert "TP 2 x PP 1" in tp2.ended.stdout


def test_a_run_writes_everything_that_it_promises_and_nothing_else(tp2):
    assert {entry.name for entry in tp2.folder.iterdir()} == {
        *("config.toml", "metrics.jsonl", "diagnostics.jsonl", "samples.jsonl", "checkpoints"),
        *("export", "summary.json", "report.html", "train.log", ".lock"),
    }


def test_config_toml_is_every_setting_and_feeds_back_as_it_is(tp2, capsys):
    text = (tp2.folder / "config.toml").read_text()
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(tp2.folder / "config.toml"), "--print_config"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == text
    with pytest.raises(SystemExit):
        main(["train", *tp2.arguments, "--print_config"])
    assert capsys.readouterr().out == text
    assert tomllib.loads(text)["telemetry"]["num_logged_samples"] == 4


def test_metrics_have_a_line_a_step_with_the_names_of_the_field(tp2):
    lines = records(tp2.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(9))
    first, *steps = lines
    assert set(first) == {"step", *EVALUATION_METRICS}
    for line in steps:
        evaluated = line["step"] in (4, 8)
        assert {name for name in line if name.startswith("eval/")} == (
            set(EVALUATION_METRICS) if evaluated else set()
        )
        assert set(STEP_METRICS) <= set(line)
        assert all(math.isfinite(line[name]) for name in STEP_METRICS)
        assert -1 <= line["reward/min"] <= line["reward/mean"] <= line["reward/max"] <= 1
        assert line["grad_norm"] > 0
        assert line["rollout/logp_gap"] < 1e-4
    assert [line["learning_rate"] for line in steps[:2]] == [0.0, 5e-4]


def test_diagnostics_and_samples_are_recorded_when_they_are_due(tp2):
    diagnostics = records(tp2.folder / "diagnostics.jsonl")
    assert [record["step"] for record in diagnostics] == [2, 4, 6, 8]
    assert all(set(record) == {"step", *DIAGNOSTICS} for record in diagnostics)
    samples = records(tp2.folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0] * 4 + [4] * 4 + [8] * 4
    for sample in samples:
        right = sample["response"].rpartition("#")[2] == sample["answer"]
        assert sample["correct"] == right
    assert len({sample["prompt"] for sample in samples}) == 4


def test_checkpoints_are_complete_with_their_manifests(tp2):
    store = CheckpointStore(tp2.folder / "checkpoints")
    assert store.steps() == [4, 8]
    for step in store.steps():
        assert (store.path(step) / MANIFEST_NAME).is_file()
        verify(store.path(step))
    assert {entry.name for entry in store.root.iterdir()} == {"step_000004", "step_000008"}


def test_the_summary_is_of_the_metrics(tp2):
    summary = json.loads((tp2.folder / "summary.json").read_text())
    lines = records(tp2.folder / "metrics.jsonl")
    for name in ("greedy_accuracy", "avg@2", "pass@2"):
        assert summary["before"][name] == lines[0][f"eval/{name}"]
        assert summary["after"][name] == lines[8][f"eval/{name}"]
    assert summary["steps"] == 8
    norms = sorted(line["grad_norm"] for line in lines[1:])
    assert summary["grad_norm"]["median"] == pytest.approx((norms[3] + norms[4]) / 2)
    assert summary["train_seconds"] == pytest.approx(
        sum(
            line[f"time/{phase}_seconds"]
            for line in lines[1:]
            for phase in ("rollout", "teacher", "student")
        )
    )
    assert summary["export"] == str(tp2.folder / "export")


class Links(HTMLParser):
    """What a page refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = re.findall(r"url\(\s*['\"]?([^)'\"]+)", html)
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        names = ("src", "srcset", "data", "action", "poster") + (("href",) * (tag != "a"))
        self.found += [value for name, value in attributes if name in names and value]


def test_the_report_needs_no_other_file_and_no_network(tp2):
    html = (tp2.folder / "report.html").read_text()
    assert [link for link in Links(html).found if not link.startswith(("#", "data:"))] == []
    assert "@import" not in html
    assert "<svg" in html


def test_the_end_says_what_improved_and_where_everything_is(tp2):
    lines = tp2.ended.stdout.splitlines()
    log = (tp2.folder / "train.log").read_text().splitlines()
    assert lines == log
    said = [line.partition("  ")[2] for line in lines]
    at = next(number for number, line in enumerate(said) if line.startswith("finished 8 steps"))
    words = [line.split() for line in said[at + 1 :]]
    assert words[0] == ["before", "after", "change"]
    assert ["greedy", "accuracy"] in [line[:2] for line in words]
    places = {line[0]: line[1] for line in words if line[0] in ("export", "report", "metrics")}
    assert places == {
        "export": str(tp2.folder / "export"),
        "report": str(tp2.folder / "report.html"),
        "metrics": str(tp2.folder / "metrics.jsonl"),
    }
    assert sum(line.startswith("step ") for line in said) == 8
    assert "Traceback" not in tp2.ended.stderr


def test_one_seed_gives_one_run(tp2, killed_tp2):
    again = metrics(killed_tp2)
    assert len(again) >= 6
    assert again == metrics(tp2.folder)[: len(again)]


def test_a_finished_run_that_is_started_again_shows_its_summary_and_stays_as_it_is(tp2):
    before = everything_in(tp2.folder)
    again = train(tp2.arguments, world_size=2).expect(0)
    assert everything_in(tp2.folder) == before
    assert (
        "holds a finished run; a larger train_steps with --optimizer.lr_decay_iters 8 would go on "
        "with it, another output_dir would start anew"
    ) in again.stdout
    first = [line.partition("  ")[2] for line in tp2.ended.stdout.splitlines()]
    second = [line.partition("  ")[2] for line in again.stdout.splitlines()]
    end = next(number for number, line in enumerate(first) if line.startswith("finished 8 steps"))
    assert second[1:] == first[end:]


def test_a_finished_run_goes_on_with_larger_train_steps(bf16, tmp_path):
    folder = tmp_path / "longer"
    shutil.copytree(bf16.folder, folder)
    before = records(folder / "metrics.jsonl")
    same = ("--student.dtype=bf16", "--optimizer.lr_warmup_iters=0")
    same += ("--optimizer.lr_decay_style=constant",)
    ended = train(settings(folder, *same, steps=4)).expect(0)
    assert "training for 4 steps, going on after step 2" in ended.stdout
    assert steps_recorded(folder) == [0, 1, 2, 3, 4]
    assert records(folder / "metrics.jsonl")[:3] == before
    assert CheckpointStore(folder / "checkpoints").steps() == [2, 4]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4
    assert tomllib.loads((folder / "config.toml").read_text())["train_steps"] == 4
    weights = "export/model.safetensors"
    assert (folder / weights).read_bytes() != (bf16.folder / weights).read_bytes()
