"""Everything that `poweropd eval` reads before it touches the model."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from poweropd_megatron.checkpoint.store import digest
from poweropd_megatron.config.evaluation import check_evaluation
from poweropd_megatron.config.evaluation_schema import EvaluationConfig
from poweropd_megatron.data.prompts import Prompt
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import ConfigError, InputError
from poweropd_megatron.evaluation.prompts import longest, read_eval_prompts
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.model_inputs import (
    check_kernels,
    check_positions,
    check_tokens,
    read_model,
)
from poweropd_megatron.output_dir import check_output_dir


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """The model's shape, its tokenizer, and the prompts by file stem."""

    model: ModelConfig
    tokenizer: Tokenizer
    prompts: dict[str, list[Prompt]]


def read_evaluation_inputs(config: EvaluationConfig, *, world_size: int) -> EvaluationInputs:
    """Return the inputs of an evaluation.

    Raises: ConfigError or InputError naming the setting: impossible layouts, folders that hold no
    known model, bad prompt files, prompts and responses longer than the model's positions.
    """
    check_evaluation(config, world_size)
    check_kernels()
    _check_place(config)
    if config.student.megatron:
        # Megatron takes seconds to import.
        from poweropd_megatron.models.megatron_settings import check_generating_settings

        check_generating_settings(config.student.megatron)
    model = read_model("student", config.student)
    tokenizer = Tokenizer.from_folder(config.student.path, setting="student.path")
    check_tokens(model, tokenizer)
    prompts = read_eval_prompts(config.data, tokenizer, max_prompts=config.eval.max_prompts)
    check_positions(
        "eval.max_new_tokens", config.eval.max_new_tokens, longest(prompts), "student", model
    )
    return EvaluationInputs(model=model, tokenizer=tokenizer, prompts=prompts)


def model_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of a model folder's files, hidden ones aside.

    `.metadata`, which a torch_dist folder can't be read without, is among them.
    Raises: InputError if one can't be read. Cost: reads the folder once.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(_is_hidden(part) for part in path.relative_to(folder).parts)
    )
    whole = hashlib.sha256()
    try:
        with ThreadPoolExecutor() as threads:
            for path, content in zip(files, threads.map(digest, files), strict=True):
                whole.update(f"{path.relative_to(folder)}\0{content}\n".encode())
    except OSError as error:
        raise InputError(f"student.path: {folder} can't be read: {error}") from None
    return whole.hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 over what is asked, its tokens, and what is right."""
    rows = [[p.id, p.text, p.token_ids, p.answer, p.tolerance] for p in prompts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and name != ".metadata"


def _check_place(config: EvaluationConfig) -> None:
    output, model = Path(config.output_dir), Path(config.student.path)
    check_output_dir(output)
    if output.resolve().is_relative_to(model.resolve()):
        raise ConfigError(
            f"output_dir: {output} lies in student.path, whose files tell one model from another: "
            "choose another output_dir"
        )
