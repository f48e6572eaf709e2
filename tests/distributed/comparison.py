"""How far results are from their reference."""

from collections.abc import Mapping

from torch import Tensor


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
