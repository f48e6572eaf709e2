"""Everything that a run reads before it touches a model, checked while an error costs nothing."""

from dataclasses import dataclass
from pathlib import Path

from poweropd_megatron.config import rules
from poweropd_megatron.config.objective import KINDS
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.data.answers import AnswerChecker, build_answer_checker
from poweropd_megatron.data.prompts import Prompt, load_prompts
from poweropd_megatron.data.tokenizer import Tokenizer, check_same_vocabulary
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.evaluation.prompts import longest, read_eval_prompts
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.model_inputs import (
    check_kernels,
    check_positions,
    check_tokens,
    read_model,
)
from poweropd_megatron.models.other_files import check_other_files
from poweropd_megatron.telemetry.trackers import check_trackers
from poweropd_megatron.train.output_folder import check_place


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Model shapes, tokenizer, prompts and the answer checker of a run."""

    student: ModelConfig
    teacher: ModelConfig
    tokenizer: Tokenizer
    teacher_eos_id: int
    train_prompts: list[Prompt]
    eval_prompts: dict[str, list[Prompt]]
    """By file stem, in the order of data.eval_files."""
    answer_checker: AnswerChecker


def read_inputs(config: TrainConfig, *, world_size: int) -> RunInputs:
    """Return the inputs of a run.

    Raises: ConfigError or InputError naming the setting: impossible layouts, packages that are
    missing, kernels that don't exist, folders that hold no known model, files beside the student
    that the export can't copy, tokenizers that differ, bad prompt files, prompts and responses
    longer than a model's positions.
    """
    rules.check(config, world_size)
    check_trackers(config.telemetry)
    check_place(config)
    if config.student.megatron or config.teacher.megatron:
        # Megatron takes seconds to import.
        from poweropd_megatron.models.megatron_settings import check_megatron_settings

        check_megatron_settings(config)
    for part in (config.student, config.teacher):
        check_kernels(part.megatron.get("attention_backend", "auto"))
    student = read_model("student", config.student)
    teacher = read_model("teacher", config.teacher)
    check_other_files(Path(config.student.path), setting="student.path")
    tokenizer = Tokenizer.from_folder(config.student.path, setting="student.path")
    teacher_tokenizer = Tokenizer.from_folder(config.teacher.path, setting="teacher.path")
    check_same_vocabulary(tokenizer, teacher_tokenizer)
    _check_vocabulary_sizes(student, teacher, tokenizer)
    _check_compared_vocabulary(config, student, teacher)
    train_prompts = load_prompts(
        config.data.train_files,
        tokenizer,
        config.data,
        setting="data.train_files",
        need_answers=False,
    )
    eval_prompts = read_eval_prompts(config.data, tokenizer, max_prompts=config.eval.max_prompts)
    _check_terminal(config, student, teacher_tokenizer.eos_token_id)
    inputs = RunInputs(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        teacher_eos_id=teacher_tokenizer.eos_token_id,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        answer_checker=build_answer_checker(config.data),
    )
    _check_lengths(config, inputs)
    return inputs


def _check_vocabulary_sizes(
    student: ModelConfig, teacher: ModelConfig, tokenizer: Tokenizer
) -> None:
    if student.vocab_size > teacher.vocab_size:
        raise ConfigError(
            f"student.path has vocab_size {student.vocab_size}, more than teacher.path's "
            f"{teacher.vocab_size}: it couldn't score every token that the student generates"
        )
    check_tokens(student, tokenizer)


def _check_compared_vocabulary(
    config: TrainConfig, student: ModelConfig, teacher: ModelConfig
) -> None:
    kind = config.objective.kind
    if KINDS[kind].family == "exact" and student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"objective.kind = {kind!r} compares the models token by token, but student.path has "
            f"vocab_size {student.vocab_size} and teacher.path {teacher.vocab_size}: choose models "
            "with one vocabulary, or a kind that rewards drawn tokens, such as 'power'"
        )
    if "top_k" in KINDS[kind].settings and config.objective.top_k > student.vocab_size:
        raise ConfigError(
            f"objective.top_k = {config.objective.top_k} is more than the {student.vocab_size} "
            f"tokens of student.path: use less, or objective.kind = {kind.removeprefix('topk_')!r}"
        )


def _check_terminal(config: TrainConfig, student: ModelConfig, teacher_eos_id: int) -> None:
    if config.objective.terminal == "im_end" and teacher_eos_id >= student.vocab_size:
        raise ConfigError(
            "objective.terminal = 'im_end' trains the student on the teacher's EOS, "
            f"{teacher_eos_id}, but student.path has vocab_size {student.vocab_size}: choose "
            "another policy"
        )


def _check_lengths(config: TrainConfig, inputs: RunInputs) -> None:
    """Refuse responses that could run past the positions that a model was made for."""
    longest_train = max(len(prompt.token_ids) for prompt in inputs.train_prompts)
    needs = [
        ("rollout.max_new_tokens", config.rollout.max_new_tokens, longest_train, "student"),
        ("rollout.max_new_tokens", config.rollout.max_new_tokens, longest_train, "teacher"),
    ]
    if inputs.eval_prompts:
        longest_eval = longest(inputs.eval_prompts)
        needs.append(("eval.max_new_tokens", config.eval.max_new_tokens, longest_eval, "student"))
    for setting, new_tokens, prompt_length, name in needs:
        model = inputs.student if name == "student" else inputs.teacher
        check_positions(setting, new_tokens, prompt_length, name, model)
