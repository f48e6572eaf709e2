"""The page about several runs."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from support.html_page import Page

from poweropd_megatron.cli.main import main
from poweropd_megatron.errors import ConfigError, InputError
from poweropd_megatron.telemetry.comparison import write_comparison
from poweropd_megatron.telemetry.groups import differing_settings, estimate, grouped
from poweropd_megatron.telemetry.records import read_run


def write_run(
    folder: Path, *, seed=1, accuracy=0.5, objective="kind = 'power'\nalpha = 5.0", **top
):
    folder.mkdir(parents=True)
    lines = [f"output_dir = '{folder}'", f"seed = {seed}"]
    lines += [f"{name} = {value!r}" for name, value in top.items()]
    lines += ["[objective]", objective, "[student.parallel]", "tensor_model_parallel_size = 2"]
    (folder / "config.toml").write_text("\n".join(lines))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(21):
            record = {"step": step} | ({"grad_norm": 0.1 * step * seed} if step else {})
            if step % 10 == 0:
                value = 0.4 + (accuracy - 0.4) * step / 20
                record |= {"eval/greedy_accuracy": value, "eval/greedy_accuracy_se": 0.02}
            file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture
def folders(tmp_path):
    clip = "kind = 'clip'\nclip_low = -1.0\nclip_high = 1.0"
    return [
        write_run(tmp_path / "power-1", seed=1, accuracy=0.7),
        write_run(tmp_path / "clip-1", seed=1, accuracy=0.5, objective=clip),
        write_run(tmp_path / "power-2", seed=2, accuracy=0.8),
        write_run(tmp_path / "clip-2", seed=2, accuracy=0.6, objective=clip),
    ]


def test_runs_that_differ_in_seed_are_one_group_named_by_what_differs(folders):
    runs = [read_run(folder) for folder in folders]
    groups = grouped(runs)
    assert [group.label for group in groups] == ["power, alpha 5", "clip, clip-low -1, clip-high 1"]
    assert [[run.folder.name for run in group.runs] for group in groups] == [
        ["power-1", "power-2"],
        ["clip-1", "clip-2"],
    ]
    assert set(differing_settings(runs)) == {"seed", "objective.kind"}


def test_other_settings_are_in_the_name_and_a_layout_is_not(tmp_path):
    folders = [
        write_run(tmp_path / "a", train_steps=100, micro_batch_size=1),
        write_run(tmp_path / "b", train_steps=200, micro_batch_size=2),
        write_run(tmp_path / "c", train_steps=200, micro_batch_size=4),
    ]
    groups = grouped([read_run(folder) for folder in folders])
    assert [group.label for group in groups] == ["train_steps 100", "train_steps 200"]


def test_a_setting_that_an_older_release_lacks_had_its_default(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", mini_batch_size=4)]
    folders.append(write_run(tmp_path / "c", distributed_timeout_minutes=30.0))
    objective = "kind = 'power'\nalpha = 5.0\nterminal = 'mask'"
    folders.append(write_run(tmp_path / "d", objective=objective))
    runs = [read_run(folder) for folder in folders]
    assert differing_settings(runs) == ["mini_batch_size"]
    labels = [group.label for group in grouped(runs)]
    assert labels == ["mini_batch_size -", "mini_batch_size 4"]


def test_runs_without_settings_go_by_their_folder_and_equal_names_get_it_too(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    (folders[0] / "config.toml").unlink()
    folders.append(write_run(tmp_path / "c", objective="kind = 'power'\nalpha = 5.0\nhead2 = 1"))
    labels = [group.label for group in grouped([read_run(folder) for folder in folders])]
    assert labels == ["a", "power, alpha 5 (b)", "power, alpha 5 (c)"]


@pytest.mark.parametrize("values", [[0.7, 0.8], [0.1, 0.5, 0.2, 0.9]])
def test_the_standard_error_is_that_of_the_mean_over_runs(values):
    mean, error = estimate(values, error=9.0)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))


def test_one_run_keeps_its_own_standard_error_and_a_gap_has_no_mean():
    assert estimate([0.7], error=0.02) == (0.7, 0.02)
    assert estimate([0.7, None]) is None
    assert estimate([]) is None


def test_the_page_has_the_final_numbers_of_each_group(folders):
    path = write_comparison(folders, folders[0].parent / "out.html")
    page = Page(path.read_text())
    assert page.after("largest", 7) == [
        "before training", "0", "40.0 %", "-", "-", "power, alpha 5", "2",
    ]  # fmt: skip
    start = page.words.index("power, alpha 5", page.words.index("before training"))
    assert page.words[start : start + 6] == [
        "power, alpha 5", "2", "20", "75.0 % ± 5.0", "1.575", "4",
    ]  # fmt: skip
    assert "clip, clip-low -1, clip-high 1" in page.words
    assert page.tags.count("figure") == 2
    assert page.after("Settings that differ", 5) == [
        "objective.kind", "power, alpha 5", "power", "clip, clip-low -1, clip-high 1", "clip",
    ]  # fmt: skip


def test_the_page_stands_alone_and_the_same_runs_give_the_same_bytes(folders):
    path = write_comparison(folders, folders[0].parent / "out.html")
    html = path.read_text()
    assert "#0a00" not in html
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', html)
    assert all((first or second).startswith("#") for first, second in links)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert write_comparison(folders, path).read_text() == html


def test_labels_are_escaped(tmp_path):
    folders = [write_run(tmp_path / "<b>a"), write_run(tmp_path / "<b>b")]
    for folder in folders:
        (folder / "config.toml").unlink()
    page = Page(write_comparison(folders, tmp_path / "out.html").read_text())
    assert "b" not in page.tags
    assert "<b>a" in page.words


def test_bad_folders_and_places_are_named(folders, tmp_path):
    with pytest.raises(ConfigError, match="power-1 is given twice"):
        write_comparison([folders[0], folders[1], folders[0]], tmp_path / "out.html")
    with pytest.raises(InputError, match="nowhere is not a folder"):
        write_comparison([folders[0], tmp_path / "nowhere"], tmp_path / "out.html")
    with pytest.raises(ConfigError, match=r"--output: .*no/out\.html can't be written"):
        write_comparison(folders, tmp_path / "no" / "out.html")


def test_the_command_writes_where_it_is_told(folders, tmp_path, capsys):
    target = tmp_path / "out.html"
    assert main(["report", *map(str, folders[:2]), "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert "clip" in target.read_text()
