"""What a user can get wrong: exit code 2 and one message that names the setting, no traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.bad_run import NO_EVALUATION, copied, only_message
from support.cli_run import (
    RANK_VARIABLES,
    REPO,
    launch,
    settings,
    train,
)

from poweropd_megatron.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that starts a run that must be refused before any rank joins the job, and
    returns the message.
    """
    monkeypatch.chdir(REPO)

    def refused(*changes: str, world_size: int = 1, **layout: int) -> str:
        for name in RANK_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        assert main(["train", *settings(tmp_path / "run", *changes, **layout)]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        assert not (tmp_path / "run").is_dir()
        return only_message(said.err)

    return refused


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_model_folder_that_is_not_there(name, message, tmp_path):
    said = message(f"--{name}.path={tmp_path / 'none'}")
    assert said == f"{name}.path: {tmp_path / 'none'} is not a folder"


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_model_of_an_unknown_family(name, message, tmp_path):
    folder = copied(name, tmp_path / "model", model_type="gpt2")
    said = message(f"--{name}.path={folder}")
    assert said.startswith(f"{name}.path: {folder / 'config.json'}: has model_type 'gpt2'")
    assert "'llama', 'qwen3', 'qwen3_moe'" in said


def test_tokenizers_that_differ_are_shown_with_their_first_differences(message, tmp_path):
    folder = copied("teacher", tmp_path / "teacher")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["3"], ids["7"] = ids["7"], ids["3"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = message(f"--teacher.path={folder}")
    assert said.startswith("student.path (examples/chain_sum/student) and teacher.path")
    for token, other in (("3", "7"), ("7", "3")):
        line = f"token {token!r} is {ids[other]} for the student and {ids[token]} for the teacher"
        assert line in said


@pytest.mark.parametrize(
    ("change", "pp", "words"),
    [
        (
            "--student.parallel.virtual_pipeline_model_parallel_size=2",
            1,
            "virtual_pipeline_model_parallel_size = 2 needs "
            "student.parallel.pipeline_model_parallel_size > 1, not 1",
        ),
        (
            "--student.parallel.virtual_pipeline_model_parallel_size=4",
            2,
            "the 2 of stage 0 don't come out even over 4 chunks; "
            "virtual_pipeline_model_parallel_size = 2 would work",
        ),
        (
            "--teacher.megatron.num_layers_in_first_pipeline_stage=4",
            2,
            "teacher.megatron.num_layers_in_first_pipeline_stage = 4 can't deal out",
        ),
        (
            "--student.megatron.recompute_granularty=full",
            1,
            "the nearest are recompute_granularity",
        ),
        ("--student.megatron.lr=1", 1, "student.megatron.lr can't be given: optimizer.lr sets it"),
        ("--student.megatron.bucket_size=x", 1, "must be an integer or null"),
    ],
)
def test_a_pipeline_or_a_setting_of_megatrons_that_cannot_be(change, pp, words, message):
    assert words in message(change, pp=pp, world_size=pp)


@pytest.mark.parametrize("part", ["student", "teacher"])
@pytest.mark.parametrize(
    ("tp", "pp", "world_size", "words"),
    [
        (2, 1, 1, "must divide the number of ranks (1): start 2 ranks, or choose sizes"),
        (2, 2, 6, "must divide the number of ranks (6): start 4 or 8 ranks"),
        (
            3,
            1,
            3,
            "tensor_model_parallel_size = 3 must divide the {}'s attention heads (4); 1, 2 or 4",
        ),
        (1, 3, 3, "pipeline_model_parallel_size = 3 must divide the {}'s layers (4); 1, 2 or 4"),
    ],
)
def test_a_layout_that_cuts_nothing_into_equal_parts(part, tp, pp, world_size, words, message):
    said = message(
        f"--{part}.parallel.tensor_model_parallel_size={tp}",
        f"--{part}.parallel.pipeline_model_parallel_size={pp}",
        "--global_batch_size=12",
        "--micro_batch_size=1",
        world_size=world_size,
    )
    assert said.startswith(f"{part}.parallel.")
    assert words.format(part) in said


def test_a_batch_that_the_data_parallel_ranks_cannot_share(message):
    said = message("--global_batch_size=9", "--micro_batch_size=2", world_size=2)
    assert said.startswith("global_batch_size = 9 must be a multiple of micro_batch_size = 2")
    assert "set global_batch_size to 8 or 12" in said


@pytest.mark.parametrize("alpha", ["0", "-1", "0.0"])
def test_an_alpha_that_is_not_positive_names_the_limit(alpha, message):
    said = message(f"--objective.alpha={alpha}")
    assert said.startswith("objective.alpha must be > 0")
    assert "objective.kind = 'log_ratio'" in said


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--optimizer.lrr=1", "optimizer.lr"),
        ("--rollout.max_new_token=1", "rollout.max_new_tokens"),
        ("--objektive.alpha=1", "objective.alpha"),
        ("--train_step=1", "train_steps"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(argument, nearest, message):
    name = argument.removeprefix("--").partition("=")[0]
    said = message(argument)
    assert said.startswith(f"{name} is not a setting; did you mean ")
    assert nearest in said


@pytest.mark.parametrize("setting", ["data.train_files", "data.eval_files"])
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", " is empty; expected one JSON object a line"),
        ('{"prompt": "1+2=", "answer": "3"}\nnot json\n', ":2 is not valid JSON"),
        ('{"prompt": "1+2=", "answer": "3"}\n\n{"prompt": "1=", "answer": "1"}\n', ":2 is blank"),
        ('{"text": "1+2=", "answer": "3"}\n', ':1: expected one of "prompt" and "messages"'),
        (
            '{"prompt": "1=", "answer": "1"}\n{"prompt": "1+1+1+1+1+1+1+1+1=", "answer": "9"}\n',
            ":2: the prompt has 18 tokens, more than data.max_prompt_length = 16; raise that",
        ),
    ],
)
def test_a_prompt_file_that_cannot_be_used(setting, lines, words, message, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines)
    said = message(f'--{setting}=["{file}"]')
    assert said.startswith(f"{setting}: {file}")
    assert words in said


def test_prompts_that_are_not_there_or_have_no_answer_to_evaluate(message, tmp_path):
    file = tmp_path / "prompts.jsonl"
    said = message(f'--data.train_files=["{file}"]')
    assert said == f"data.train_files: {file} is not a file"
    file.write_text('{"prompt": "1+2="}\n')
    said = message(f'--data.eval_files=["{file}"]')
    assert said.startswith(f'data.eval_files: {file}:1 has no "answer"')


def test_responses_longer_than_the_models_positions(message):
    said = message("--rollout.max_new_tokens=501")
    assert said.startswith("rollout.max_new_tokens = 501 after a prompt of 12 tokens exceeds")
    assert "use at most 500" in said


def test_an_output_dir_that_is_a_file(message, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert message() == f"output_dir: {tmp_path / 'run'} is a file; name a folder"
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("kept", [0, 7, 5000, -1])
def test_weights_that_are_cut_off(kept, message, tmp_path):
    file = copied("student", tmp_path / "student") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    said = message(f"--student.path={tmp_path / 'student'}")
    assert said.startswith(f"student.path: {file} can't be read")


def test_under_torchrun_the_message_is_printed_once_and_the_exit_code_is_2(tmp_path):
    none = tmp_path / "none"
    ended = launch(settings(tmp_path / "run", f"--teacher.path={none}"), world_size=2).expect(2)
    assert only_message(ended.stderr) == f"teacher.path: {none} is not a folder"
    assert ended.stdout == ""


def test_weights_that_are_not_those_of_config_json(message, tmp_path):
    file = copied("student", tmp_path / "student") / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.3.mlp.down_proj.weight"]
    save_file(tensors, file)
    said = message(f"--student.path={tmp_path / 'student'}")
    assert said.startswith("student.path: config.json describes 4 layers, but ")
    assert said.endswith(" lacks model.layers.3.mlp.down_proj.weight")


def test_a_tensor_of_another_shape_ends_all_ranks_and_binds_no_later_start(tmp_path):
    """Only the rank that holds the layer finds it, when the others could be in a collective."""
    folder = copied("student", tmp_path / "student")
    name = "model.layers.3.mlp.down_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name][:-1].clone()}, folder / "model.safetensors")
    run = settings(tmp_path / "run", f"--student.path={folder}", *NO_EVALUATION, steps=3)
    ended = train([*run, "--student.parallel.pipeline_model_parallel_size=2"], world_size=2)
    said = only_message(ended.expect(2).stderr)
    shapes = "has the shape (63, 128), but config.json implies (64, 128)"
    assert said == f"student.path: {name} {shapes} (on rank 1)"
    assert not (tmp_path / "run" / "config.toml").exists()

    save_file(tensors, folder / "model.safetensors")
    train([*run, "--seed=7"]).expect(0)
