"""The check that no NaN goes on unnoticed."""

import math

from torch import Tensor

from poweropd_megatron.errors import NonFiniteError


def check_finite(
    what: str, values: Tensor, advice: str, *, may_be_impossible: bool = False
) -> None:
    """Return if no value is NaN or infinite; -inf passes as a log-prob that may be impossible.

    Called with the same values on every rank.
    Raises: NonFiniteError with the advice.
    """
    bad = ~values.isfinite()
    if may_be_impossible:
        bad &= values != -math.inf
    count = int(bad.sum())
    if count:
        raise NonFiniteError(
            f"{count} of {values.numel()} values of the {what} are not finite; {advice}"
        )
