"""How far results are from their reference."""

from collections.abc import Iterator, Mapping

from torch import Tensor
from training import Measured


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


def copies(measured: Measured) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield every copy of every gradient and weight, with the first copy of it."""
    for what in (measured.gradients, measured.weights):
        for name, tensors in what.items():
            yield from ((name, tensor, tensors[0]) for tensor in tensors)
