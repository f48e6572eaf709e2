"""A Hugging Face folder: whether config.json, index and files agree. Reads headers, no weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from poweropd_megatron.conversion.hf_tensors import HEAD
from poweropd_megatron.errors import InputError
from poweropd_megatron.inspection.findings import SETTING, Facts, Findings
from poweropd_megatron.models.families import (
    check_num_layers,
    hugging_face_shapes,
    read_model_config,
)
from poweropd_megatron.models.families.config_file import ConfigFile
from poweropd_megatron.models.hf_folder import INDEX_NAME
from poweropd_megatron.models.model_config import ModelConfig

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""torch's names of safetensors' types that models have."""
_COMPANIONS = ("generation_config.json", "tokenizer_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def examine(path: Path) -> Findings:
    """Return what a Hugging Face folder holds, with all that is wrong.

    Cost: reads config.json, the index and the header of each file.
    """
    findings = Findings(path=path, weights_path=path, kind="hugging-face")
    _read_headers(findings)
    try:
        findings.model = read_model_config(path, setting=SETTING)
    except InputError as error:
        findings.add_error(error)
    if findings.model is not None:
        _check_tensors(findings, findings.model)
        check_dtype(findings, path)
    for name in _COMPANIONS:
        if not (path / name).is_file():
            findings.notes.append(f"no {name}")
    if not any((path / name).is_file() for name in _TOKENIZERS):
        findings.notes.append(f"no tokenizer ({', '.join(_TOKENIZERS)})")
    return findings


def _check_tensors(findings: Findings, model: ModelConfig) -> None:
    """Add a problem for tensors other than those that config.json implies."""
    try:
        check_num_layers(model, len(findings.tensors), findings.path, setting=SETTING)
    except InputError as error:
        findings.add_error(error)
        return
    optional = [HEAD] if model.tie_word_embeddings else []
    findings.compare_shapes(hugging_face_shapes(model), optional=optional)


def _read_headers(findings: Findings) -> None:
    """Fill in tensors and files, and check them against the index where there is one."""
    path = findings.path
    index, weight_map = _read_index(findings)
    file_of: dict[str, str] = {}
    present = {file.name for file in path.glob("*.safetensors")}
    for file_name in sorted(present | set(weight_map.values())):
        if file_name not in present:
            findings.problems.append(f"{path / file_name} is missing, though {INDEX_NAME} names it")
            continue
        if index is not None and file_name not in weight_map.values():
            findings.problems.append(f"{path / file_name} is not in {INDEX_NAME}")
            continue
        try:
            facts = dict(_header(path / file_name))
        except InputError as error:
            findings.problems.append(str(error))
            continue
        findings.files[file_name] = (path / file_name).stat().st_size
        for name in facts.keys() & file_of.keys():
            findings.problems.append(f"{name} is in {file_of[name]} and in {file_name}")
        if index is not None:
            elsewhere = [name for name in facts if weight_map.get(name) != file_name]
            findings.add_tensors(f"in {file_name}, but not by {INDEX_NAME}", elsewhere)
            absent = [n for n, f in weight_map.items() if f == file_name and n not in facts]
            findings.add_tensors(f"not in {file_name}, though {INDEX_NAME} says so", absent)
        file_of |= dict.fromkeys(facts, file_name)
        findings.tensors |= facts
    if not present and not weight_map:
        findings.problems.append(f"no *.safetensors file in {path}")
    _check_total_size(findings, index)


def _read_index(findings: Findings) -> tuple[dict[str, Any] | None, dict[str, str]]:
    path = findings.path / INDEX_NAME
    if not path.exists():
        return None, {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
        if not all(isinstance(place, str) for place in weight_map.values()):
            raise TypeError
    except (OSError, ValueError) as error:
        findings.problems.append(f"{path} can't be read as JSON: {error}")
        return None, {}
    except (TypeError, KeyError, AttributeError):
        findings.problems.append(f"{path} has no weight_map of tensors to files")
        return None, {}
    return index, weight_map


def _header(path: Path) -> Iterator[tuple[str, Facts]]:
    """Yield the tensors of a file. Raises: InputError if it is truncated or no safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                dtype = part.get_dtype()
                yield name, Facts(_DTYPES.get(dtype, dtype), tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} can't be read: {error}") from None


def _check_total_size(findings: Findings, index: dict[str, Any] | None) -> None:
    if index is None:
        return
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated is None:
        findings.notes.append(f"{INDEX_NAME} states no total_size")
    elif stated != findings.num_bytes:
        findings.problems.append(
            f"{INDEX_NAME} states total_size {stated}, the tensors have {findings.num_bytes} bytes"
        )


def check_dtype(findings: Findings, folder: Path) -> None:
    """Add a problem if a config.json names a type that no tensor has: transformers would cast."""
    file = ConfigFile(folder, setting=SETTING)
    stated = file.get("dtype") or file.get("torch_dtype")
    if stated is None:
        findings.notes.append("config.json states no dtype")
    elif findings.tensors and stated not in list(findings.dtypes):
        findings.problems.append(
            f"config.json states {stated}, the tensors are {', '.join(sorted(findings.dtypes))}"
        )
