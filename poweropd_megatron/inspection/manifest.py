"""SHA-256 of a model's tensors under their Hugging Face names: the same whatever the format.

A folder in Hugging Face's format and its conversion to Megatron's have equal manifests.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from poweropd_megatron.conversion.arrays import Buffer
from poweropd_megatron.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor: its type as torch names it, its shape, and the SHA-256 of its bytes.

    The bytes are in row-major order, little-endian, as safetensors stores them.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def num_elements(self) -> int:
        """Return the number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


OTHER_VALUES = "other values"

type Manifest = Mapping[str, Entry]
"""Entries by Hugging Face name."""


def entry_of(dtype: torch.dtype, shape: tuple[int, ...], pieces: Iterable[Buffer]) -> Entry:
    """Return the entry of a tensor whose bytes come in pieces."""
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece)
    name = str(dtype).removeprefix("torch.")
    return Entry(dtype=name, shape=shape, sha256=sha256.hexdigest())


def digest_of(manifest: Manifest) -> str:
    """Return one SHA-256 for a model: of its names, types, shapes and digests, sorted by name."""
    whole = hashlib.sha256()
    for name in sorted(manifest):
        entry = manifest[name]
        shape = ",".join(map(str, entry.shape))
        whole.update(f"{name} {entry.dtype} [{shape}] {entry.sha256}\n".encode())
    return whole.hexdigest()


def differences(found: Manifest, expected: Manifest) -> dict[str, str]:
    """Return name -> how it differs, in the order of `expected`, then those that it doesn't have.

    A tensor is missing, unexpected, of another type or shape, or has other bytes.
    """
    differing: dict[str, str] = {}
    for name, wanted in expected.items():
        entry = found.get(name)
        if entry is None:
            differing[name] = "missing"
        elif entry.dtype != wanted.dtype:
            differing[name] = f"is {entry.dtype}, expected {wanted.dtype}"
        elif entry.shape != wanted.shape:
            differing[name] = f"has the shape {entry.shape}, expected {wanted.shape}"
        elif entry.sha256 != wanted.sha256:
            differing[name] = OTHER_VALUES
    return differing | {name: "unexpected" for name in found if name not in expected}


def write(manifest: Manifest, path: Path) -> None:
    """Write a manifest as JSON, by one rename.

    Raises: InputError if the file can't be written.
    """
    lines = [
        f"  {json.dumps(name)}: "
        + json.dumps({"dtype": entry.dtype, "shape": entry.shape, "sha256": entry.sha256})
        for name, entry in manifest.items()
    ]
    text = (
        f'{{"model_sha256": "{digest_of(manifest)}",\n "tensors": {{\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error}") from None


def read(path: Path) -> dict[str, Entry]:
    """Return the manifest in a file.

    Raises: InputError if it can't be read, is no manifest, or was changed since it was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = content["model_sha256"]
        manifest = {
            str(name): Entry(
                dtype=str(entry["dtype"]),
                shape=tuple(int(size) for size in entry["shape"]),
                sha256=str(entry["sha256"]),
            )
            for name, entry in content["tensors"].items()
        }
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as a manifest: {error}") from None
    except (TypeError, KeyError, AttributeError):
        raise InputError(
            f"{path} is not a manifest of tensors, as verify --write makes it"
        ) from None
    if digest_of(manifest) != stated:
        raise InputError(f"{path} was changed: its entries don't give its model_sha256")
    return manifest
