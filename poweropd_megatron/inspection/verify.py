"""A folder's weights, read whole: digests, NaN, and what differs from another folder's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch

from poweropd_megatron.checkpoint import store
from poweropd_megatron.conversion.arrays import Buffer
from poweropd_megatron.conversion.hf_tensors import EMBEDDING, HEAD
from poweropd_megatron.errors import CheckpointError
from poweropd_megatron.inspection import manifest
from poweropd_megatron.inspection.findings import NUM_NAMED, Findings, named
from poweropd_megatron.inspection.manifest import Entry
from poweropd_megatron.inspection.tensors import NamedTensor, tensors_of


@dataclass(kw_only=True)
class Digests:
    """The manifest of a folder's tensors, and what is wrong with their values."""

    entries: dict[str, Entry]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def digest(findings: Findings) -> Digests:
    """Return the digests of a folder that examine() has found without problems.

    A head that is tied and stored nevertheless must equal the embedding, and is left out, as the
    other format doesn't hold it.
    Raises: InputError if a tensor can't be read.
    Cost: reads the weights once; the files of a checkpoint with a manifest twice.
    """
    assert findings.model is not None
    not_finite: list[str] = []
    entries = {}
    for name, tensor in tensors_of(findings).items():
        pieces = _watched(name, tensor, not_finite)
        entries[name] = manifest.entry_of(tensor.dtype, tensor.shape, pieces)
    digests = Digests(entries=entries)
    if not_finite:
        digests.problems.append(
            f"{len(not_finite)} tensors hold NaN or infinity: {named(not_finite)}"
        )
    if findings.model.tie_word_embeddings and HEAD in digests.entries:
        if digests.entries.pop(HEAD) == digests.entries[EMBEDDING]:
            digests.notes.append(f"{HEAD} is stored though it is tied; equal to the embedding")
        else:
            digests.problems.append(f"{HEAD} differs from {EMBEDDING}, to which it is tied")
    if (findings.weights_path / store.MANIFEST_NAME).is_file():
        try:
            store.verify(findings.weights_path)
        except CheckpointError as error:
            digests.problems.append(str(error))
    return digests


def _watched(name: str, tensor: NamedTensor, not_finite: list[str]) -> Iterator[Buffer]:
    """Yield a tensor's bytes, noting its name if a value isn't finite."""
    is_finite = True
    for piece in tensor.pieces():
        values = torch.from_numpy(piece.reshape(-1)).view(tensor.dtype)
        is_finite = is_finite and bool(torch.stack(values.aminmax()).isfinite().all())
        yield piece
    if not is_finite:
        not_finite.append(name)


def explain(
    differing: dict[str, str],
    one: Mapping[str, NamedTensor],
    other: Mapping[str, NamedTensor] | None,
) -> list[str]:
    """Return a line for each of the first tensors that differ, with how far where values do.

    other: None where only its manifest is known.
    """
    lines = []
    for name in list(differing)[:NUM_NAMED]:
        how = differing[name]
        if how == manifest.OTHER_VALUES and other is not None:
            how += f": {_distance(one[name], other[name])}"
        lines.append(f"{name}: {how}")
    if len(differing) > NUM_NAMED:
        lines.append(f"and {len(differing) - NUM_NAMED} more tensors")
    return lines


def _distance(one: NamedTensor, other: NamedTensor) -> str:
    """Return how many elements of tensors of one type and shape differ, and by how much at most."""
    count, largest = 0, 0.0
    for pieces in zip(one.pieces(), other.pieces(), strict=True):
        bits = [torch.from_numpy(piece).view(-1, one.dtype.itemsize) for piece in pieces]
        count += int((bits[0] != bits[1]).any(dim=1).sum())
        values = [x.view(one.dtype).double() for x in bits]
        largest = max(largest, float((values[0] - values[1]).abs().max()))
    return f"{count} of {prod(one.shape)} elements, by at most {largest:.3g}"
