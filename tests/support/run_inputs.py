"""What a run reads before it starts, on copies that a test may spoil."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.run_settings import small_run

from poweropd_megatron.config.schema import DataConfig, TrainConfig
from poweropd_megatron.train.inputs import read_inputs


def working_config(folder: Path, student: Path, teacher: Path) -> TrainConfig:
    """Return settings that work, on copies of the bundled models and two prompt files."""
    shutil.copytree(student, folder / "student")
    shutil.copytree(teacher, folder / "teacher")
    write_lines(folder / "train.jsonl", {"prompt": "1+2+3="}, {"prompt": "4+5+6+7="})
    rows = [{"prompt": f"{i}+1+1=", "answer": str(i + 2)} for i in range(5)]
    write_lines(folder / "held_out.jsonl", *rows)
    write_lines(folder / "more.jsonl", {"prompt": "9+9+9=", "answer": 27})
    config = small_run(
        folder / "student",
        folder / "teacher",
        data=DataConfig(
            train_files=[str(folder / "train.jsonl")],
            eval_files=[str(folder / "held_out.jsonl"), str(folder / "more.jsonl")],
            max_prompt_length=16,
        ),
        output_dir=str(folder / "runs" / "new"),
    )
    config.rollout.max_new_tokens = config.eval.max_new_tokens = 64
    return config


def write_lines(file: Path, *rows: Any) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(line + "\n" for line in lines))


def edit_json(path: str, **changes: Any) -> None:
    file = Path(path)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def swap_two_tokens(config: TrainConfig) -> None:
    file = Path(config.teacher.path) / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["5"], vocab["6"] = vocab["6"], vocab["5"]
    file.write_text(json.dumps(tokenizer))


def refused(config: TrainConfig, kind: type[Exception], *parts: str, world_size: int = 1) -> None:
    """Assert that the inputs are refused with a message that has these parts, in order."""
    with pytest.raises(kind, match="(?s)" + ".*".join(map(re.escape, parts))):
        read_inputs(config, world_size=world_size)
