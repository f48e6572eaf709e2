"""What a run reads before it starts, and every way in which that can be wrong."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import qwen3_folder
from support.run_inputs import edit_json, refused, swap_two_tokens, working_config, write_lines

from poweropd_megatron.config.objective import ObjectiveConfig
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.errors import ConfigError, InputError
from poweropd_megatron.train.inputs import read_inputs

Change = Callable[[TrainConfig], None]


@pytest.fixture
def config(tmp_path: Path, student_folder: Path, teacher_folder: Path) -> TrainConfig:
    """Return settings that work, on copies of the bundled models and two prompt files."""
    return working_config(tmp_path, student_folder, teacher_folder)


def test_good_inputs_are_read_and_nothing_is_written(config: TrainConfig) -> None:
    config.eval.max_prompts = 3
    edit_json(f"{config.teacher.path}/generation_config.json", eos_token_id=2)
    inputs = read_inputs(config, world_size=1)
    assert inputs.student.num_layers == inputs.teacher.num_layers == 4
    assert (inputs.tokenizer.eos_token_id, inputs.teacher_eos_id) == (1, 2)
    assert [prompt.text for prompt in inputs.train_prompts] == ["1+2+3=", "4+5+6+7="]
    assert inputs.train_prompts[0].token_ids == (4, 13, 5, 13, 6, 14)
    answers = {source: [p.answer for p in ps] for source, ps in inputs.eval_prompts.items()}
    assert answers == {"held_out": ["2", "3", "4"], "more": ["27"]}
    assert inputs.answer_checker.check("9+9=18;18+9=27#27", "27").correct
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize(
    ("damage", "kind", "parts"),
    [
        (shutil.rmtree, InputError, ["is not a folder"]),
        (lambda path: (path / "config.json").unlink(), InputError, ["config.json is missing"]),
        (
            lambda path: edit_json(path / "config.json", model_type="gpt2"),
            InputError,
            ["config.json: has model_type 'gpt2'; supported are 'llama', 'qwen3'"],
        ),
        (
            lambda path: (path / "model.safetensors").unlink(),
            InputError,
            ["no *.safetensors file in"],
        ),
        (
            lambda path: os.truncate(path / "model.safetensors", 1000),
            InputError,
            ["model.safetensors can't be read"],
        ),
        (
            lambda path: (path / "tokenizer.json").unlink(),
            InputError,
            ["tokenizer.json is missing", "save_pretrained"],
        ),
    ],
    ids=["no folder", "no config", "no known family", "no weights", "truncated", "no tokenizer"],
)
def test_a_folder_that_holds_no_usable_model_is_named_with_its_setting(
    config: TrainConfig,
    model: str,
    damage: Callable[[Path], Any],
    kind: type[Exception],
    parts: list[str],
) -> None:
    folder = Path(getattr(config, model).path)
    damage(folder)
    refused(config, kind, f"{model}.path: ", *parts)


def test_tokenizers_that_differ_are_refused_with_the_first_differences(
    config: TrainConfig,
) -> None:
    swap_two_tokens(config)
    refused(
        config,
        ConfigError,
        "student.path (",
        "teacher.path (",
        "have different tokenizers",
        "token '5' is 8 for the student and 9 for the teacher",
        "token '6' is 9 for the student and 8 for the teacher",
    )


@pytest.mark.parametrize(
    ("model", "tensor", "pipeline", "world_size", "parts"),
    [
        ("student", 8, 1, 8, ["attention heads (4)", "1, 2 or 4 would work"]),
        ("teacher", 8, 1, 8, ["attention heads (4)", "1, 2 or 4 would work"]),
        ("student", 1, 8, 8, ["layers (4)", "1, 2 or 4 would work"]),
        ("teacher", 2, 8, 16, ["layers (4)", "1, 2 or 4 would work"]),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused_with_sizes_that_do(
    config: TrainConfig,
    model: str,
    tensor: int,
    pipeline: int,
    world_size: int,
    parts: list[str],
) -> None:
    parallel = getattr(config, model).parallel
    parallel.tensor_model_parallel_size = tensor
    parallel.pipeline_model_parallel_size = pipeline
    config.global_batch_size = 2 * world_size
    size = "pipeline_model_parallel_size" if pipeline > 1 else "tensor_model_parallel_size"
    value = pipeline if pipeline > 1 else tensor
    refused(
        config,
        ConfigError,
        f"{model}.parallel.{size} = {value} must divide the {model}'s",
        *parts,
        world_size=world_size,
    )


def test_a_layout_that_does_not_divide_the_ranks_is_refused(config: TrainConfig) -> None:
    config.teacher.parallel.tensor_model_parallel_size = 2
    refused(config, ConfigError, "teacher.parallel.tensor_model_parallel_size = 2", world_size=3)


@pytest.mark.parametrize(
    ("setting", "rows", "parts"),
    [
        ("train_files", [], ["is empty; expected one JSON object a line"]),
        ("eval_files", [], ["is empty; expected one JSON object a line"]),
        ("train_files", [{"prompt": "1="}, "{oops"], [":2 is not valid JSON"]),
        ("train_files", [{"prompt": "1="}, {"text": "1="}], [":2: ", "got neither"]),
        ("train_files", [{"prompt": "1="}] * 3 + [""], [":4 is blank"]),
        (
            "eval_files",
            [{"prompt": "1=", "answer": "1"}, {"prompt": "1="}],
            [":2 has no", "answer"],
        ),
        (
            "train_files",
            [{"prompt": "1="}, {"prompt": "1+1+1+1+1+1+1+1+1="}],
            [":2: the prompt has 18 tokens, more than data.max_prompt_length = 16"],
        ),
    ],
    ids=["no train", "no eval", "no JSON", "no prompt", "blank", "no answer", "too long"],
)
def test_a_bad_prompt_file_is_named_with_its_setting_and_line(
    config: TrainConfig, tmp_path: Path, setting: str, rows: list[Any], parts: list[str]
) -> None:
    write_lines(tmp_path / "bad.jsonl", *rows)
    setattr(config.data, setting, [str(tmp_path / "bad.jsonl")])
    refused(config, InputError, f"data.{setting}: {tmp_path / 'bad.jsonl'}", *parts)


def test_a_prompt_file_that_is_missing_is_named(config: TrainConfig, tmp_path: Path) -> None:
    config.data.train_files.append(str(tmp_path / "none.jsonl"))
    refused(config, InputError, f"data.train_files: {tmp_path / 'none.jsonl'} is not a file")


def limit_positions(model: str, limit: int) -> Change:
    def change(config: TrainConfig) -> None:
        path = getattr(config, model).path
        edit_json(f"{path}/config.json", max_position_embeddings=limit)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            limit_positions("student", 71),
            "rollout.max_new_tokens = 64 after a prompt of 8 tokens exceeds the student's "
            "max_position_embeddings (71): use at most 63",
        ),
        (
            limit_positions("teacher", 71),
            "rollout.max_new_tokens = 64 after a prompt of 8 tokens exceeds the teacher's "
            "max_position_embeddings (71): use at most 63",
        ),
        (
            lambda config: setattr(config.eval, "max_new_tokens", 507),
            "eval.max_new_tokens = 507 after a prompt of 6 tokens exceeds the student's "
            "max_position_embeddings (512): use at most 506",
        ),
    ],
    ids=["student", "teacher", "evaluation"],
)
def test_responses_that_could_pass_a_models_last_position_are_refused(
    config: TrainConfig, change: Change, message: str
) -> None:
    change(config)
    refused(config, ConfigError, message)


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_responses_may_reach_the_last_position(config: TrainConfig, model: str) -> None:
    limit_positions(model, 72)(config)
    assert read_inputs(config, world_size=1).train_prompts


def test_a_teacher_without_rows_for_all_the_students_tokens_is_refused(
    config: TrainConfig,
) -> None:
    edit_json(f"{config.teacher.path}/config.json", vocab_size=20)
    refused(config, ConfigError, "student.path has vocab_size 24, more than teacher.path's 20")


def test_objectives_over_the_vocabulary_need_one_of_a_size(config: TrainConfig) -> None:
    config.objective = ObjectiveConfig(kind="reverse_kl")
    edit_json(f"{config.teacher.path}/config.json", vocab_size=26)
    refused(config, ConfigError, "objective.kind = 'reverse_kl'", "vocab_size 24", "path 26")


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_no_more_tokens_are_told_apart_than_there_are(config: TrainConfig, kind: str) -> None:
    config.objective = ObjectiveConfig(kind=f"topk_{kind}", top_k=25)
    refused(config, ConfigError, "objective.top_k = 25 is more than the 24 tokens", f"'{kind}'")
    config.objective.top_k = 24
    read_inputs(config, world_size=1)


def test_a_model_without_rows_for_all_tokens_is_refused(config: TrainConfig) -> None:
    for model in (config.student, config.teacher):
        edit_json(f"{model.path}/config.json", vocab_size=16)
    refused(config, InputError, "student.path: the tokenizer has 18 tokens", "vocab_size 16")


def test_a_teacher_of_another_shape_and_file_layout_is_accepted(config: TrainConfig) -> None:
    folder = Path(config.teacher.path)
    (folder / "model.safetensors").unlink()
    qwen3_folder.write(folder, num_files=3, vocab_size=29)
    teacher = read_inputs(config, world_size=1).teacher
    assert (teacher.num_layers, teacher.vocab_size) == (2, 29)


def test_an_output_folder_that_is_a_file_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    config.output_dir = str(tmp_path / "runs")
    refused(config, ConfigError, f"output_dir: {tmp_path / 'runs'} is a file; name a folder")


def test_an_output_folder_that_may_not_be_made_is_refused(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr(os, "access", lambda *question: asked.append(question))
    refused(config, ConfigError, f"output_dir: {tmp_path} can't be written to")
    assert asked == [(tmp_path, os.W_OK)]


def test_an_output_folder_below_a_file_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    config.output_dir = str(tmp_path / "runs" / "new")
    refused(config, ConfigError, f"output_dir: {tmp_path / 'runs'} is a file")


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_config_that_describes_other_layers_than_the_weights_is_refused(
    config: TrainConfig, model: str
) -> None:
    folder = getattr(config, model).path
    edit_json(f"{folder}/config.json", num_hidden_layers=2)
    refused(config, InputError, f"{model}.path", "describes 2 layers", "model.layers.2.", "more")
    edit_json(f"{folder}/config.json", num_hidden_layers=8)
    refused(config, InputError, f"{model}.path", "describes 8 layers", "lacks model.layers.4.")
