"""Checkpoints on disk: complete or invisible, verified, never overwritten.

Knows files, not what is in them.

A checkpoint is written into a hidden folder, its manifest last, and becomes visible by one rename.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from poweropd_megatron.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


class CheckpointStore:
    """The checkpoints of a run: one folder step_NNNNNN each, under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.root / f"step_{step:06d}"

    def partial(self, step: int) -> Path:
        """Return the hidden folder that the checkpoint of a step is written into."""
        return self.root / f".{self.path(step).name}.partial"

    def steps(self) -> list[int]:
        """Return the steps of the published checkpoints, in order."""
        if not self.root.is_dir():
            return []
        matches = (_STEP_FOLDER.fullmatch(entry.name) for entry in self.root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def begin(self, step: int) -> Path:
        """Return an empty hidden folder for a step's checkpoint; crashed saves are removed.

        Raises: CheckpointError if that step is published already, or the folder can't be made.
        """
        if self.path(step).exists():
            raise CheckpointError(
                f"{self.path(step)} exists already; checkpoints are never overwritten"
            )
        partial = self.partial(step)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob(".step_*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise CheckpointError(f"{partial} can't be made: {error}") from error
        return partial

    def publish(self, partial: Path, step: int, digests: dict[str, str]) -> Path:
        """Make a finished checkpoint visible: manifest, fsync, one rename, fsync of the parent.

        digests holds the SHA-256 of each file, read back from the disk.
        Raises: CheckpointError if the digests don't cover the folder's files, or the disk refuses.
        """
        names = {file.name for file in partial.iterdir()}
        if names != set(digests):
            raise CheckpointError(f"{partial} holds {sorted(names)}, hashed were {sorted(digests)}")
        final = self.path(step)
        try:
            write_manifest(partial, digests, step=step)
            _fsync_folder(partial)
            partial.rename(final)
            _fsync_folder(self.root)
        except OSError as error:
            raise CheckpointError(f"{final} can't be published: {error}") from error
        return final

    def discard(self, partial: Path) -> None:
        """Remove an unfinished checkpoint."""
        shutil.rmtree(partial, ignore_errors=True)

    def prune(self, keep_last: int) -> list[int]:
        """Delete all but the newest checkpoints, and return the steps that are gone."""
        gone = self.steps()[:-keep_last]
        for step in gone:
            hidden = self.partial(step)
            self.path(step).rename(hidden)
            shutil.rmtree(hidden)
        return gone


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, digests: dict[str, str], **facts: object) -> None:
    """Write the manifest of a folder's files, given the SHA-256 of each, and bring it to the disk.

    Raises: OSError.
    """
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digests[name]}
        for name in sorted(digests)
    }
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        json.dump(facts | {"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(checkpoint: Path) -> dict[str, dict[str, object]]:
    """Return name -> {bytes, sha256} of a published checkpoint's files.

    Raises: CheckpointError if the manifest is missing or malformed.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {
            str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in files.items()
        }
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error}); {_remedy(checkpoint)}") from None
    except (TypeError, KeyError, AttributeError):
        raise CheckpointError(
            f"{path} is not a manifest of names, bytes and SHA-256; {_remedy(checkpoint)}"
        ) from None


def verify(checkpoint: Path, names: Iterable[str] | None = None) -> None:
    """Return if a checkpoint's files (or some of them) are as they were when it was published.

    Raises: CheckpointError naming the file that is missing, truncated or changed.
    Cost: reads the files once.
    """
    manifest = read_manifest(checkpoint)
    for name in manifest if names is None else names:
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {_remedy(checkpoint)}")
        size = path.stat().st_size
        if size != manifest[name]["bytes"]:
            raise CheckpointError(
                f"{path} has {size} bytes, the manifest says {manifest[name]['bytes']}; "
                f"{_remedy(checkpoint)}"
            )
        if digest(path) != manifest[name]["sha256"]:
            raise CheckpointError(
                f"{path} is corrupt: its SHA-256 is not the manifest's; {_remedy(checkpoint)}"
            )


def _remedy(checkpoint: Path) -> str:
    return f"restore it, or delete {checkpoint} to resume from the checkpoint before it"


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
