"""What a user can get wrong about a run that is there: one message that names it, no traceback."""

import json
import shutil

import pytest
from support.bad_run import NO_EVALUATION, copied, only_message
from support.cli_run import REPO, ForkedRun, rewound, settings, steps_recorded, train

from poweropd_megatron.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_with_other_frozen_settings_is_refused_with_each_difference(one, monkeypatch, capfd):
    monkeypatch.chdir(REPO)
    before = (one.folder / "config.toml").read_bytes()
    changes = ("--objective.alpha=2", "--seed=5", "--micro_batch_size=4", "--eval.interval=2")
    assert main(["train", *one.arguments, *changes]) == 2
    said = only_message(capfd.readouterr().err)
    assert said.startswith(f"{one.folder} holds a run with other settings: ")
    assert "seed: was 1234, is 5; objective.alpha: was 1.0, is 2.0. " in said
    assert "micro_batch_size" not in said
    assert (one.folder / "config.toml").read_bytes() == before


def test_more_steps_that_would_stretch_the_decay_of_the_learning_rate(one, monkeypatch, capfd):
    monkeypatch.chdir(REPO)
    assert main(["train", *one.arguments, "--train_steps=9"]) == 2
    said = only_message(capfd.readouterr().err)
    assert "optimizer.lr_decay_iters: was 8, is 9. --optimizer.lr_decay_iters 8 keeps" in said


def test_fewer_steps_than_are_done(one, tmp_path):
    folder = rewound(one.folder, 8, tmp_path / "run")
    before = (folder / "config.toml").read_bytes()
    said = only_message(train(settings(folder, steps=6)).expect(2).stderr)
    assert said.startswith("train_steps = 6, but ")
    assert "has a checkpoint of step 8: set train_steps to at least that" in said
    assert (folder / "config.toml").read_bytes() == before


def test_a_corrupt_newest_checkpoint_is_named_and_the_remedy_works(one, tmp_path):
    folder = rewound(one.folder, 8, tmp_path / "run")
    newest = folder / "checkpoints" / "step_000008"
    file = newest / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = only_message(train(settings(folder)).expect(2).stderr)
    assert said.startswith(f"{file} is corrupt: its SHA-256 is not the manifest's")
    assert f"delete {newest} to resume from the checkpoint before it" in said

    shutil.rmtree(newest)
    assert "going on after step 4" in train(settings(folder)).expect(0).stdout


def test_a_file_that_one_rank_finds_missing_ends_both_with_one_message(tp2, tmp_path):
    folder = rewound(tp2.folder, 8, tmp_path / "run")
    file = folder / "checkpoints" / "step_000008" / "__1_0.distcp"
    file.unlink()
    ended = train(settings(folder, tp=2), world_size=2).expect(2)
    assert only_message(ended.stderr).startswith(f"{file} is missing; restore it, or delete ")


def test_a_checkpoint_of_another_model_or_of_other_prompts(tmp_path):
    folder = copied("student", tmp_path / "student")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+2="}\n' * 5)
    changes = (f"--student.path={folder}", f'--data.train_files=["{prompts}"]', *NO_EVALUATION)
    run = settings(tmp_path / "run", *changes, "--optimizer.lr_decay_style=constant", steps=3)
    train(run).expect(0)

    longer = [*run, "--train_steps=4"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    said = only_message(train(longer).expect(2).stderr)
    assert "step_000003 belongs to another student: layernorm_epsilon was 1e-06" in said

    (folder / "config.json").write_text(json.dumps(config))
    prompts.write_text('{"prompt": "1+2="}\n' * 6)
    said = only_message(train(longer).expect(2).stderr)
    assert "written with 5 training prompts, but data.train_files now has 6" in said


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
    run = settings(tmp_path / "run", *NO_EVALUATION, steps=1000)
    with ForkedRun(run) as first:
        first.wait_until(lambda: 1 in steps_recorded(tmp_path / "run"))
        said = only_message(train(run).expect(2).stderr)
        assert said == f"output_dir: another run is writing to {tmp_path / 'run'}"
        done = steps_recorded(tmp_path / "run")
        assert done == list(range(len(done)))
        first.wait_until(lambda: len(steps_recorded(tmp_path / "run")) > len(done))
