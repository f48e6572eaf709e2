"""Where the tensors of a Hugging Face folder lie in its files, and the headers of new files.

Source: the safetensors format: eight bytes with the length of a JSON header, the header, the bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poweropd_megatron.conversion.arrays import PIECE_BYTES, FileBlock, Files, read_pieces
from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families import check_num_layers, hugging_face_shapes
from poweropd_megatron.models.hf_folder import INDEX_NAME, HFFolder
from poweropd_megatron.models.model_config import ModelConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FACTS = "__metadata__"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class HFTensor:
    """A tensor in a safetensors file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    array: FileBlock


def read_tensors(folder: Path, *, setting: str) -> dict[str, HFTensor]:
    """Return each tensor of a folder by name.

    Raises: InputError naming the file, or the tensor, that is missing, truncated, or of a dtype
    other than bf16, fp16 and fp32.
    """
    hf_folder = HFFolder(folder, setting=setting)
    file_of = {name: hf_folder.file(name) for name in hf_folder.names()}
    files = Files(setting)
    tensors: dict[str, HFTensor] = {}
    for path in sorted(set(file_of.values())):
        header, start = _read_header(path)
        for name, entry in header.items():
            if name == _FACTS:
                continue
            if name not in file_of:
                raise InputError(
                    f"{setting}: {path} has a tensor {name}, which {INDEX_NAME} doesn't name"
                )
            if file_of[name] != path:
                raise InputError(
                    f"{setting}: {path} has a tensor {name}, which {INDEX_NAME} places in "
                    f"{file_of[name].name}"
                )
            if entry["dtype"] not in DTYPES:
                raise InputError(
                    f"{setting}: {path}: {name} is {entry['dtype']}; expected one of "
                    f"{', '.join(DTYPES)} (quantised weights are not supported)"
                )
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            row_bytes = dtype.itemsize * prod(shape[1:])
            offset = start + entry["data_offsets"][0]
            array = FileBlock(files, path, offset, prod(shape[:1]), row_bytes)
            tensors[name] = HFTensor(path, dtype, shape, array)
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file that HFFolder has found sound, and where the bytes begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def check_tensors(config: ModelConfig, tensors: Mapping[str, HFTensor], *, setting: str) -> None:
    """Return if a folder holds exactly the tensors that its config.json implies.

    With tied embeddings lm_head.weight may be there too; it is compared with the embedding.
    Raises: InputError naming the tensor that is missing, unknown, or of another shape.
    """
    place = next(iter(tensors.values())).path.parent
    check_num_layers(config, len(tensors), place, setting=setting)
    expected = hugging_face_shapes(config)
    if config.tie_word_embeddings and HEAD in tensors:
        expected[HEAD] = expected[EMBEDDING]
    for name in sorted(expected.keys() - tensors.keys()):
        raise InputError(f"{setting}: {place} has no tensor {name}, which config.json implies")
    for name in sorted(tensors.keys() - expected.keys()):
        raise InputError(
            f"{setting}: {tensors[name].path} has a tensor {name}, which a {config.model_type} "
            "with this config.json doesn't have"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{setting}: {tensors[name].path}: {name} has the shape {tensors[name].shape}, but "
                f"config.json implies {shape}"
            )
    if config.tie_word_embeddings and HEAD in tensors:
        _check_tied(tensors[HEAD], tensors[EMBEDDING], setting)


def _check_tied(head: HFTensor, embedding: HFTensor, setting: str) -> None:
    buffers = [np.empty(PIECE_BYTES, np.uint8) for _ in range(2)]
    rows = range(embedding.shape[0])
    pieces = [
        read_pieces(tensor.array, buffer, rows)
        for tensor, buffer in zip((head, embedding), buffers, strict=True)
    ]
    is_equal = head.dtype == embedding.dtype and all(
        np.array_equal(one, other) for one, other in zip(*pieces, strict=True)
    )
    if not is_equal:
        raise InputError(
            f"{setting}: {head.path}: {HEAD} differs from {EMBEDDING}, though config.json has "
            "tie_word_embeddings = true"
        )


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
    """Return the beginning of a file with these tensors, in this order, and where each begins."""
    header: dict[str, Any] = {_FACTS: {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + dtype.itemsize * prod(shape)
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + header[name]["data_offsets"][0] for name in tensors}
    return len(text).to_bytes(8, "little") + text, offsets
