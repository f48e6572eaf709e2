"""Which tensor lies in which file of a Hugging Face folder: as in a reference, or by size."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from poweropd_megatron.errors import InputError
from poweropd_megatron.json_file import read_json
from poweropd_megatron.models.hf_folder import INDEX_NAME, HFFolder, is_weight_file

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB, 500MB or 2GiB. Raises: ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    num_bytes = int(Decimal(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if num_bytes <= 0:
        raise ValueError(f"{text!r} is no size above 0 such as 5GB, 500MB or 2GiB")
    return num_bytes


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written."""

    name: str
    num_bytes: int


def reference_files(reference: Path, *, setting: str) -> dict[str, str]:
    """Return the file of each tensor in a reference; nothing if it has neither index nor weights.

    The index is enough: the files that it names need not be there.
    Raises: InputError for a malformed index or file.
    """
    index_path = reference / INDEX_NAME
    if index_path.is_file():
        weight_map = read_json(index_path, setting).get("weight_map")
        is_map = isinstance(weight_map, dict) and all(
            isinstance(place, str) and is_weight_file(place) for place in weight_map.values()
        )
        if not is_map:
            raise InputError(f"{setting}: {index_path} has no weight_map of names to file names")
        assert isinstance(weight_map, dict)
        return weight_map
    if not any(reference.glob("*.safetensors")):
        return {}
    folder = HFFolder(reference, setting=setting)
    return {name: folder.file(name).name for name in folder.names()}


def by_size(tensors: Sequence[Tensor], max_bytes: int) -> dict[str, str]:
    """Return the file of each tensor, where each is closed before it gets larger than max_bytes."""
    groups: list[list[str]] = [[]]
    group_bytes = 0
    for tensor in tensors:
        if groups[-1] and group_bytes + tensor.num_bytes > max_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(tensor.name)
        group_bytes += tensor.num_bytes
    if len(groups) == 1:
        return dict.fromkeys(groups[0], "model.safetensors")
    return {
        name: f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        for number, group in enumerate(groups, 1)
        for name in group
    }


def check_same_tensors(
    weight_map: Mapping[str, str], names: Sequence[str], *, setting: str, reference: Path
) -> None:
    """Return if a reference names exactly these tensors. Raises: InputError naming one."""
    for name in sorted(set(names) - weight_map.keys()):
        raise InputError(f"{setting}: {reference} has no tensor {name}, which config.json implies")
    for name in sorted(weight_map.keys() - set(names)):
        raise InputError(
            f"{setting}: {reference} has a tensor {name}, which its config.json doesn't imply"
        )
