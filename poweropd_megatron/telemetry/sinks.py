"""Records on disk: JSON lines that survive a kill, and files that are old or new but never half."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from poweropd_megatron.errors import ConfigError, InputError


class JsonlSink:
    """A file of JSON records, one a line, that a resumed run can wind back.

    Every record carries its integer "step". NaN and infinities, which JSON cannot express, are
    written as null. A line is handed to the operating system before `write` returns, so a killed
    process loses nothing but, at worst, the end of the line that it was writing.
    """

    def __init__(self, path: Path) -> None:
        """Write to path, which need not exist yet; its folder must."""
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises: TypeError for a value that is not a JSON type (a tensor, say).
        """
        line = json.dumps(_finite(record), allow_nan=False, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop the records of later steps and a torn last line; the file is replaced by one rename.

        Call it on every start, so that no record is appended to a torn line.

        Raises: InputError for a torn line that is not the last, or a line without a "step".
        """
        if not self.path.exists():
            return
        kept = [line for line, record in _complete_lines(self.path) if record["step"] <= step]
        replace_text(self.path, "".join(kept))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file that may still be written to: a torn last line is left out.

    Raises: InputError for any other line that is not a JSON object with a "step", with its number.
    """
    return [record for _, record in _complete_lines(path)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, whose values are numbers or null: see read_jsonl.

    Raises: InputError for what read_jsonl refuses, or another value, with its line and name.
    """
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        for name, value in record.items():
            if not isinstance(value, int | float | None):
                raise InputError(
                    f"{path}, line {number}: {name} must be a number or null, as runs write it, "
                    f"not {value!r}; mend or delete the line"
                )
    return records


def check_output(path: Path) -> None:
    """Return if a command's --output can be written. Raises: ConfigError that names the path."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"--output: {path} can't be written; name a file in a folder that you can write to"
        )


def write_json_atomically(path: Path, obj: Mapping[str, Any]) -> None:
    """Replace path by obj as indented JSON; NaN and infinities become null."""
    text = json.dumps(_finite(obj), allow_nan=False, ensure_ascii=False, indent=2)
    replace_text(path, text + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace a file by one durable rename: a reader, or a crash, finds the old text or the new."""
    temporary = path.with_name(path.name + ".tmp")
    file = temporary.open("w", encoding="utf-8")
    try:
        with file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _complete_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
            record = json.loads(text)
        except ValueError as error:
            if number == len(lines):
                return
            raise InputError(
                f"{path}, line {number}: not a JSON record ({error}); delete the line to go on"
            ) from error
        if not text.endswith("\n"):
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise InputError(
                f'{path}, line {number}: expected a JSON object with an integer "step", as runs '
                "write it; delete the line, or move the file, to go on"
            )
        yield text, record


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
