"""`poweropd report` on runs that finished and on one that was killed."""

import shutil

import pytest

from poweropd_megatron.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_report_of_a_finished_run_can_be_written_again_and_is_the_same(one, tmp_path, capsys):
    shutil.copytree(one.folder, tmp_path / "run")
    written = (tmp_path / "run" / "report.html").read_bytes()
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    assert (tmp_path / "run" / "report.html").read_bytes() == written


def test_a_killed_run_has_a_report_of_what_it_did(killed_one, tmp_path, capsys):
    shutil.copytree(killed_one, tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    html = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in html
    assert "greedy accuracy" in html


def test_a_folder_without_a_run_is_refused_with_exit_code_2(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "has no metrics.jsonl; give the output_dir of a run" in capsys.readouterr().err
