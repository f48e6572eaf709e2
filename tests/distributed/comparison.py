"""How far results are from their reference."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from training import Measured

SCORES = ("teacher_logp_BT", "logp_UBT", "entropy_UBT", "loss_U", "grad_norm_U")
LEARNED = ("gradients", "weights")


def error(actual: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over the norm of the reference."""
    assert actual.shape == reference.shape
    return float((actual.double() - reference.double()).norm() / reference.double().norm())


def largest_error(
    actual: Mapping[str, list[Tensor]], reference: Mapping[str, list[Tensor]]
) -> tuple[float, str]:
    """Return the largest error of a tensor, with its name."""
    assert actual.keys() == reference.keys()
    return max((error(actual[name][0], tensors[0]), name) for name, tensors in reference.items())


def differences(measured: Measured, reference: Measured, name: str, most: float) -> Iterator[str]:
    """Yield what is further than `most` from a reference, which goes by the name."""
    ours, theirs = _tensors(measured), _tensors(reference)
    for label in sorted(ours.keys() ^ theirs.keys()):
        yield f"{label}: {'not measured' if label in theirs else f'not in {name}'}"
    for label in (label for label in ours if label in theirs):
        actual, expected = ours[label], theirs[label]
        if actual.shape != expected.shape:
            yield f"{label}: {tuple(actual.shape)}, but {tuple(expected.shape)} in {name}"
        elif not (distance := error(actual, expected)) <= most:
            yield f"{label}: {distance:.1e} from {name}"


def inner_faults(by_rank: Sequence[Measured]) -> Iterator[str]:
    """Yield what no reference is needed for: a bit that ranks were told differently or that copies
    of a tensor differ in, and padding of the vocabulary that isn't zero."""
    first = by_rank[0]
    for quantity in SCORES:
        for rank, measured in enumerate(by_rank):
            if not torch.equal(getattr(measured, quantity), getattr(first, quantity)):
                yield f"{quantity}: rank {rank} is told another than rank 0"
    for quantity in LEARNED:
        for name, copies in getattr(first, quantity).items():
            for number, copy in enumerate(copies):
                if not torch.equal(copy, copies[0]):
                    yield f"{quantity}[{name}]: copy {number} of {len(copies)} isn't the first"
    for number, rows in enumerate(first.padding):
        if not (rows == 0).all():
            yield f"padding[{number}]: up to {rows.abs().max():.1e} where 0 belongs"


def _tensors(measured: Measured) -> dict[str, Tensor]:
    """Return what a reference has, too, by a label; of copies, the first."""
    return {quantity: getattr(measured, quantity) for quantity in SCORES} | {
        f"{quantity}[{name}]": copies[0]
        for quantity in LEARNED
        for name, copies in getattr(measured, quantity).items()
    }
