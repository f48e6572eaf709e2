"""Manifests of tensors: digests of bytes, how two differ, and the file."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from poweropd_megatron.errors import InputError
from poweropd_megatron.inspection import manifest
from poweropd_megatron.inspection.manifest import OTHER_VALUES, Entry


def entry_of(tensor: Tensor) -> Entry:
    """Return a tensor's entry from its bytes in two pieces."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return manifest.entry_of(tensor.dtype, tuple(tensor.shape), [raw[:7], raw[7:]])


def entries_of(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {name: entry_of(tensor) for name, tensor in tensors.items()}


def sample() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(3, 5, generator=generator),
        "norm": torch.randn(4, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(2.5),
    }


def test_an_entry_is_the_digest_of_the_bytes_in_row_major_order() -> None:
    tensor = sample()["matrix"]
    raw = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert entry_of(tensor) == Entry(dtype="float32", shape=(3, 5), sha256=raw)
    halves = sample()["norm"]
    expected = hashlib.sha256(halves.view(torch.int16).numpy().tobytes()).hexdigest()
    assert entry_of(halves) == Entry(dtype="bfloat16", shape=(4,), sha256=expected)


@pytest.mark.parametrize("name", ["empty", "scalar"])
def test_tensors_without_rows_have_entries_too(name: str) -> None:
    tensor = sample()[name]
    raw = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert entry_of(tensor).sha256 == raw


def test_a_models_digest_depends_on_names_types_shapes_and_bytes_and_not_on_their_order() -> None:
    entries = entries_of(sample())
    whole = manifest.digest_of(entries)
    assert manifest.digest_of(dict(reversed(entries.items()))) == whole
    changed = [
        {"other" if name == "norm" else name: entry for name, entry in entries.items()},
        entries | {"norm": entry_of(sample()["norm"].view(torch.float16))},
        entries | {"matrix": entry_of(sample()["matrix"].view(5, 3))},
        entries | {"scalar": entry_of(torch.tensor(-2.5))},
        {name: entry for name, entry in entries.items() if name != "empty"},
    ]
    assert len({whole, *map(manifest.digest_of, changed)}) == 6


def test_differences_are_found_both_ways_down_to_the_sign_of_zero() -> None:
    one = {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(2), "d": torch.ones(2)}
    other = {
        "a": torch.tensor([0.0, -0.0]),
        "b": torch.ones(2).bfloat16(),
        "c": torch.ones(1, 2),
        "e": torch.ones(2),
        "z": torch.ones(1),
    }
    entries = [entries_of(tensors) for tensors in (one, other)]
    assert manifest.differences(*entries) == {
        "a": OTHER_VALUES,
        "b": "is float32, expected bfloat16",
        "c": "has the shape (2,), expected (1, 2)",
        "e": "missing",
        "z": "missing",
        "d": "unexpected",
    }
    assert manifest.differences(entries[0], entries[0]) == {}


def test_a_written_manifest_is_read_back_and_one_that_was_changed_is_refused(
    tmp_path: Path,
) -> None:
    entries = entries_of(sample())
    file = tmp_path / "manifest.json"
    manifest.write(entries, file)
    assert manifest.read(file) == entries
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]
    content = json.loads(file.read_text())
    content["tensors"]["norm"]["shape"] = [2, 2]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"manifest.json was changed"):
        manifest.read(file)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_sha256": 1, "tensors": {"a": 1}}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"manifest.json (can't be read as|is not) a manifest"):
        manifest.read(file)
    with pytest.raises(InputError, match="can't be read as a manifest"):
        manifest.read(tmp_path / "none.json")


def test_a_manifest_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none/m\.json can't be written"):
        manifest.write({}, tmp_path / "none" / "m.json")
