"""The files of a model folder that aren't weights: tokenizer, config.json and the like."""

import json
import shutil
from pathlib import Path

import torch

from poweropd_megatron.models.hf_folder import INDEX_NAME, read_json

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
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            if entry.name not in _NOT_COPIED:
                shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)
        elif not any(entry.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(entry, target / entry.name)
    stated = "dtype" if "dtype" in config else "torch_dtype"
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and config.get(stated) != name:
        text = json.dumps(config | {stated: name}, indent=2)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")
