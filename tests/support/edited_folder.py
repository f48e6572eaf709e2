"""Changes to a Hugging Face folder that leave it wrong."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def edit(folder: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def edit_json(folder: Path, name: str, **changes: object) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | changes))


def add_to_index(folder: Path, name: str, file_name: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = file_name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
