"""A JSON object in a file that a user gave."""

import json
from pathlib import Path
from typing import Any

from poweropd_megatron.errors import InputError


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder.

    Raises: InputError naming the setting, the file, and what is wrong with it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{setting}: {path} is missing; expected a Hugging Face folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{setting}: {path} can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{setting}: {path} holds a {type(value).__name__}, expected an object")
    return value
