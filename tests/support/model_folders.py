"""Folders of tiny models in both formats, damage to them, and what `poweropd` says of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import converted_folder, qwen3_folder
from support.qwen3_folder import MOE

from poweropd_megatron.cli.main import main

KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "experts": MOE,
}
INDEX = "model.safetensors.index.json"


def write_all(root: Path) -> dict[str, Path]:
    """Return folders without faults by name: each kind, its conversion, and one of three files."""
    for kind, changes in KINDS.items():
        qwen3_folder.write(root / kind, **changes)
        converted_folder.write(root / kind, root / f"{kind}-converted")
    qwen3_folder.write(root / "files", num_files=3)
    return {folder.name: folder for folder in root.iterdir()}


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name])}, file)


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Return the exit code of `poweropd`, and all that it said."""
    code = main(list(map(str, arguments)))
    output = capsys.readouterr()
    return code, output.out + output.err


def drop(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != name}, file)


def add(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file)
