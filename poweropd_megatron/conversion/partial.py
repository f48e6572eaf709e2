"""A folder that appears by one rename when it is complete, and is gone on with if interrupted.

Beside what will be published, the hidden folder holds a journal: the plan, and a record of each
part of the work that is done and on the disk. The same command with the same inputs does the rest.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poweropd_megatron.errors import InputError

_JOURNAL = ".journal"
_SECONDS_TO_WAIT = 5.0


class PartialFolder:
    """The hidden folder of an output, and its journal."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.absolute().with_name(f".{output.absolute().name}.partial")
        self._journal = self.path / _JOURNAL

    def begin(self, plan: dict[str, Any]) -> set[int]:
        """Return the parts that an interrupted conversion with the same plan has done.

        What another plan has left there is removed, and a part is to be done again if its file is
        gone, or has another size. Raises: OSError.
        """
        text = json.dumps(plan, sort_keys=True)
        plan_path = self._journal / "plan.json"
        if not plan_path.is_file() or plan_path.read_text(encoding="utf-8") != text:
            for entry in self.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self._journal.mkdir()
            _write(plan_path, text)
        return {int(record.stem) for record in self._records() if self._is_there(record)}

    def has_parts(self) -> bool:
        """Return whether there is work in it to go on with."""
        return any(self._records())

    def record(self, part: int, file: Path, facts: dict[str, Any]) -> None:
        """Bring a part's file to the disk, and note that it is done and what is to be known of it.

        Raises: OSError.
        """
        fsync(file)
        place = {"file": str(file.relative_to(self.path)), "bytes": file.stat().st_size}
        _write(self._journal / f"{part}.json", json.dumps(facts | place))

    def facts(self, part: int) -> dict[str, Any]:
        """Return what was noted of a part."""
        facts: dict[str, Any] = json.loads((self._journal / f"{part}.json").read_bytes())
        return facts

    def _records(self) -> Iterator[Path]:
        return self._journal.glob("[0-9]*.json")

    def _is_there(self, record: Path) -> bool:
        facts: dict[str, Any] = json.loads(record.read_bytes())
        file = self.path / str(facts["file"])
        return file.is_file() and file.stat().st_size == int(facts["bytes"])

    def publish(self) -> None:
        """Remove the journal and make the folder visible. Raises: OSError."""
        shutil.rmtree(self._journal)
        for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
            fsync(folder)
        self.path.rename(self.output)
        fsync(self.path.parent)


@contextmanager
def claimed(output: Path, setting: str) -> Iterator[PartialFolder]:
    """Yield the hidden folder of an output that doesn't exist yet, held for this conversion.

    Raises: InputError if the output exists, can't be made, or another conversion writes it.
    """
    partial = PartialFolder(output)
    _check_new(output, setting)
    lock = _lock(partial, setting)
    try:
        _check_new(output, setting)
        yield partial
    except BaseException:
        if not partial.has_parts():
            shutil.rmtree(partial.path, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _check_new(output: Path, setting: str) -> None:
    if output.exists() or output.is_symlink():
        raise InputError(f"{setting}: {output} exists already; name a folder that doesn't")


def _lock(partial: PartialFolder, setting: str) -> int:
    """Return the folder's descriptor, locked: only who has it may change what is there.

    The workers of a killed conversion hold it for a moment longer. Who held it may have published
    or removed the folder since it was opened, so that another is to be made.
    """
    deadline = time.monotonic() + _SECONDS_TO_WAIT
    while True:
        try:
            partial.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(partial.path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{setting}: {partial.path} can't be made: {error}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), partial.path.stat()):
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            os.close(lock)
            raise InputError(
                f"{setting}: {partial.path} can't be locked: {error}; name a folder on a disk "
                "whose file system has locks (flock)"
            ) from None
        os.close(lock)
        if time.monotonic() > deadline:
            raise InputError(f"{setting}: another conversion is writing to {partial.output}")
        time.sleep(0.05)


def check_places(output: Path, setting: str, **inputs: Path | None) -> None:
    """Return if no input folder lies in the output, nor the output in one.

    Raises: InputError naming both.
    """
    target = output.resolve()
    for name, path in inputs.items():
        if path is None:
            continue
        source = path.resolve()
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise InputError(
                f"{setting}: {output} and --{name} {path} lie in one another; name a folder "
                "outside of it"
            )


def check_space(folder: Path, num_bytes: int, setting: str) -> None:
    """Return if the disk has room for this many bytes more. Raises: InputError."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise InputError(
            f"{setting}: {num_bytes / 1e9:.3f} GB are to be written, but {folder.parent} has only "
            f"{free_bytes / 1e9:.3f} GB left: free some, or name another disk"
        )


def fingerprint(source: Path) -> list[list[Any]]:
    """Return name, size and time of change of the files of a folder."""
    entries = [(path, path.stat()) for path in sorted(source.iterdir()) if path.is_file()]
    return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in entries]


def fsync(path: Path) -> None:
    """Bring a file or folder to the disk. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    """Write a file that is complete whenever it is there."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
