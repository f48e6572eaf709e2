"""Values that would work, for messages that say so."""

from collections.abc import Iterable


def multiples_around(value: int, step: int) -> list[int]:
    """Return the multiples of step next to a value, without 0."""
    below = value // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def divisors(value: int) -> list[int]:
    """Return what divides a value, from 1 to itself."""
    return [divisor for divisor in range(1, value + 1) if value % divisor == 0]


def listed(values: Iterable[int | str]) -> str:
    """Return values as in "1, 2 or 4"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
