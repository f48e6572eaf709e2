"""NaN and infinities are found; a log-prob of -inf may be what it is."""

import math

import pytest
import torch

from poweropd_megatron.errors import NonFiniteError, UserError
from poweropd_megatron.models.finite import check_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("may_be_impossible", [True, False])
def test_a_bad_value_is_an_error_of_the_users_with_the_advice(bad, may_be_impossible):
    values = torch.tensor([[0.0, bad], [bad, -1.0]])
    expected = r"^2 of 4 values of the numbers are not finite; eat less$"
    with pytest.raises(NonFiniteError, match=expected) as caught:
        check_finite("numbers", values, "eat less", may_be_impossible=may_be_impossible)
    assert isinstance(caught.value, UserError)


def test_minus_infinity_is_an_error_unless_it_may_be():
    values = torch.tensor([0.0, -math.inf])
    check_finite("numbers", values, "", may_be_impossible=True)
    with pytest.raises(NonFiniteError, match=r"^1 of 2 values"):
        check_finite("numbers", values, "")
