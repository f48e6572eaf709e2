"""A comparison tells each fault of a row, by quantity, tensor and reference."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from comparison import SCORES, differences, inner_faults
from training import Measured

ONES = torch.ones(2, 3)
NAN = torch.full_like(ONES, torch.nan)


def made(**changes: object) -> Measured:
    scores = dict.fromkeys(SCORES, ONES)
    learned = {"gradients": {"a": [ONES, ONES], "b": [ONES]}, "weights": {"a": [ONES]}}
    return Measured(**{**scores, **learned, "padding": [ONES * 0], **changes})  # type: ignore


def test_equal_updates_have_no_faults() -> None:
    assert list(differences(made(), made(), "torch", 0.0)) == []
    assert list(inner_faults([made(), made()])) == []


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        *(({name: ONES * 1.5}, [f"{name}: 5.0e-01 from torch"]) for name in SCORES),
        ({"loss_U": NAN}, ["loss_U: nan from torch"]),
        ({"loss_U": ONES[:1]}, ["loss_U: (1, 3), but (2, 3) in torch"]),
        (
            {"gradients": {"a": [ONES * 2, ONES], "b": [NAN]}, "weights": {"a": [ONES * 3]}},
            [
                "gradients[a]: 1.0e+00 from torch",
                "gradients[b]: nan from torch",
                "weights[a]: 2.0e+00 from torch",
            ],
        ),
        (
            {"gradients": {"a": [ONES], "c": [ONES]}},
            ["gradients[b]: not measured", "gradients[c]: not in torch"],
        ),
    ],
)
def test_what_is_far_from_a_reference_is_named(
    changes: dict[str, object], faults: list[str]
) -> None:
    assert list(differences(made(**changes), made(), "torch", 0.4)) == faults


@pytest.mark.parametrize("spoil", [lambda ones: ones + 1e-6, lambda ones: ones * torch.nan])
def test_a_bit_that_ranks_or_copies_differ_in_is_named(
    spoil: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    first = made(gradients={"a": [ONES, spoil(ONES)]}, weights={"b": [ONES, ONES, spoil(ONES)]})
    by_rank = [first, made(), *(replace(first, **{name: spoil(ONES)}) for name in SCORES)]
    assert list(inner_faults(by_rank)) == [
        *(f"{name}: rank {2 + i} is told another than rank 0" for i, name in enumerate(SCORES)),
        "gradients[a]: copy 1 of 2 isn't the first",
        "weights[b]: copy 2 of 3 isn't the first",
    ]


def test_padding_that_is_not_zero_is_named() -> None:
    padding = [ONES[:0], ONES * 0, ONES * -0.5, NAN]
    assert list(inner_faults([made(padding=padding)])) == [
        "padding[2]: up to 5.0e-01 where 0 belongs",
        "padding[3]: up to nan where 0 belongs",
    ]
