"""The files of a model folder that aren't weights: tokenizer, config.json and the like."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from poweropd_megatron.errors import InputError
from poweropd_megatron.json_file import read_json
from poweropd_megatron.models.torch_dist_folder import METADATA_NAME
from poweropd_megatron.models.weight_source import WEIGHTS_NAME

_WEIGHT_FILES = (
    *("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.pt", "*.pth", "*.ckpt", "*.distcp"),
    *("*.gguf", "*.onnx", "*.onnx_data*", "*.onnx.data", "*.tflite", "*.ot"),
    *(f"*.{kind}.index.json" for kind in ("safetensors", "bin", "h5", "msgpack")),
    "latest_checkpointed_iteration.txt",
)
"""Files that hold weights, in any framework's format, or tell where weights are."""
_NOT_COPIED = (".git", ".cache")
"""Folders that downloads leave behind."""
_RELEASE_NAME = "release"
_TAKEN = (WEIGHTS_NAME, _RELEASE_NAME, ".journal")
"""What a conversion makes beside the copies."""


def copy_other_files(
    source: Path, target: Path, *, dtype: torch.dtype | None, setting: str
) -> None:
    """Copy all files but weights; let config.json state the type of the tensors.

    dtype: None where they are of several types, and config.json stays as it is.
    Raises: OSError if the target can't be written; InputError for a malformed config.json, or what
    check_other_files refuses.
    """
    config = read_json(source / "config.json", setting)
    for path in _other_files(source, setting):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    spellings = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    stated = dict.fromkeys(spellings, str(dtype).removeprefix("torch."))
    if dtype is not None and config != config | stated:
        text = json.dumps(config | stated, indent=2)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")


def check_other_files(source: Path, *, setting: str) -> int:
    """Return the bytes that copy_other_files would copy.

    Raises: InputError naming what can't be copied: a link whose target is missing or that leads
    back to a folder it lies in, a pipe, a file that can't be read, or one whose name a conversion
    gives to something else.
    """
    return sum(path.stat().st_size for path in _other_files(source, setting))


def _other_files(source: Path, setting: str) -> Iterator[Path]:
    """Yield the files to copy. Raises: InputError."""
    for entry in _entries(source, setting):
        if entry.name in _TAKEN:
            if not _is_of_conversion(entry):
                raise InputError(
                    f"{setting}: {entry} has a name that a conversion gives to a folder of its "
                    "own: rename or remove it"
                )
        elif not (entry.is_dir() and entry.name in _NOT_COPIED):
            yield from _files(entry, (source.resolve(),), setting)


def _is_of_conversion(entry: Path) -> bool:
    """Return whether weights/, or the link to it, is what a conversion made."""
    is_link = entry.name == _RELEASE_NAME and entry.is_symlink()
    return (is_link and entry.readlink() == Path(WEIGHTS_NAME)) or (entry / METADATA_NAME).is_file()


def _files(entry: Path, inside: tuple[Path, ...], setting: str) -> Iterator[Path]:
    """Yield a file, or all of a folder's, but weights.

    inside: the folders, without links, through which it was reached.
    """
    if entry.is_dir():
        folder = entry.resolve()
        if any(outer.is_relative_to(folder) for outer in inside):
            raise InputError(
                f"{setting}: {entry} links to {folder}, a folder that it lies in: remove the link"
            )
        for inner in _entries(entry, setting):
            yield from _files(inner, (*inside, folder), setting)
    elif not any(entry.match(pattern) for pattern in _WEIGHT_FILES):
        if entry.is_symlink() and not entry.exists():
            raise InputError(
                f"{setting}: {entry} links to {entry.readlink()}, which is missing: mend or "
                "remove the link"
            )
        if not entry.is_file():
            raise InputError(f"{setting}: {entry} is neither a file nor a folder: remove it")
        if not os.access(entry, os.R_OK):
            raise InputError(f"{setting}: {entry} can't be read: permit it, or remove the file")
        yield entry


def _entries(folder: Path, setting: str) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{setting}: {folder} can't be read: {error.strerror}") from None
