"""The files of a model folder that aren't weights: tokenizer, config.json and the like."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from poweropd_megatron.errors import InputError
from poweropd_megatron.json_file import read_json
from poweropd_megatron.models.hf_folder import INDEX_NAME

_WEIGHT_FILES = (
    *("*.safetensors", INDEX_NAME, "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf"),
    "latest_checkpointed_iteration.txt",
)
"""Files that hold weights, or tell where weights are."""
_NOT_COPIED = ("weights", "release", ".git", ".cache")
"""Folders: those of a converted checkpoint, and what downloads leave behind."""


def copy_other_files(
    source: Path, target: Path, *, dtype: torch.dtype | None, setting: str
) -> None:
    """Copy files and folders but for weights; let config.json state the type of the tensors.

    dtype: None where they are of several types, and config.json stays as it is.
    Raises: OSError if the target can't be written; InputError for a malformed config.json.
    """
    config = read_json(source / "config.json", setting)
    for entry in _copied(source):
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(entry, target / entry.name)
    stated = "dtype" if "dtype" in config else "torch_dtype"
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and config.get(stated) != name:
        text = json.dumps(config | {stated: name}, indent=2)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")


def check_other_files(source: Path, *, setting: str) -> None:
    """Return if what copy_other_files would copy is there.

    Raises: InputError naming a link whose target is missing.
    """
    for entry in _copied(source):
        for path in (entry, *(entry.rglob("*") if entry.is_dir() else ())):
            if not path.exists():
                raise InputError(
                    f"{setting}: {path} links to {path.readlink()}, which is missing: mend or "
                    "remove the link"
                )


def _copied(source: Path) -> Iterator[Path]:
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            if entry.name not in _NOT_COPIED:
                yield entry
        elif not any(entry.match(pattern) for pattern in _WEIGHT_FILES):
            yield entry
