"""What ranks tell each other: errors, and rows that one rank of each model copy knows."""

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankError, RankPool
from torch import Tensor

from poweropd_megatron.errors import CheckpointError, ConfigError, InputError, UserError
from poweropd_megatron.parallel.world import agreed, on_first_rank, own_rows, share_rows

ERRORS: dict[int, UserError] = {
    0: ConfigError("first"),
    1: InputError("second"),
    2: CheckpointError("third"),
    3: UserError("fourth"),
}


CASES = [
    ([0], "ConfigError", "first (on rank 0)"),
    ([2], "CheckpointError", "third (on rank 2)"),
    ([1, 3], "InputError", "second (on rank 1)"),
    ([1, 2, 3], "InputError", "second (on rank 1)"),
    ([0, 1, 2, 3], "ConfigError", "first"),
]


def agree(failing: list[int]) -> tuple[str, str, int | None]:
    """Return the kind and text of the error that this rank saw, and its result."""

    def step() -> int:
        if dist.get_rank() in failing:
            raise ERRORS[dist.get_rank()]
        return 10 * dist.get_rank()

    try:
        return "", "", agreed(step)
    except UserError as error:
        return type(error).__name__, str(error), None


def agree_again_and_again() -> list[tuple[str, str, int | None]]:
    return [agree(failing) for failing in ([], *(case[0] for case in CASES), [])]


def test_all_ranks_raise_the_first_ranks_error_and_can_go_on(ranks: RankPool) -> None:
    for rank, seen in enumerate(ranks.run(agree_again_and_again, world_size=4)):
        no_error = ("", "", 10 * rank)
        assert seen == [no_error, *((kind, text, None) for _, kind, text in CASES), no_error]


def refuse_on_first_rank() -> list[str]:
    """Return what this rank saw of an error of rank 0, then of a step that went well."""

    def step() -> None:
        assert dist.get_rank() == 0
        raise ConfigError("taken")

    seen = []
    try:
        on_first_rank(step)
    except ConfigError as error:
        seen.append(str(error))
    on_first_rank(lambda: seen.append("done"))
    return seen


def test_what_the_first_rank_does_for_all_fails_on_all_without_naming_it(ranks: RankPool) -> None:
    seen = ranks.run(refuse_on_first_rank, world_size=3)
    assert seen == [["taken", "done"], ["taken"], ["taken"]]


def agree_on_a_bug() -> None:
    def step() -> None:
        if dist.get_rank() == 1:
            raise ZeroDivisionError("a bug")

    agreed(step)


def test_an_error_of_ours_is_not_taken_for_the_users(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2: (.|\n)*ZeroDivisionError: a bug"):
        ranks.run(agree_on_a_bug, world_size=2)


def share_what_two_ranks_know(wholes: list[Tensor]) -> list[Tensor]:
    """Ranks 1 and 3 speak, each for its share in reverse; the others hold values that are wrong."""
    rank = dist.get_rank()
    speaks = rank % 2 == 1
    shared = []
    for whole in wholes:
        indices = own_rows(len(whole), rank=rank // 2, size=2).flip(0)
        rows = whole[indices] if speaks else torch.full_like(whole[indices], 99)
        shared.append(
            share_rows(rows, indices, tuple(whole.shape), speaks=speaks, device=torch.device("cpu"))
        )
    return shared


def test_shared_rows_are_exact_on_every_rank(ranks: RankPool) -> None:
    generator = torch.Generator().manual_seed(1)
    wholes = [
        (1e6 * torch.randn(num_rows, 2, 3, generator=generator, dtype=torch.float64)).to(dtype)
        for num_rows in (0, 1, 2, 5)
        for dtype in (torch.int64, torch.float32, torch.float64)
    ]
    for shared in ranks.run(share_what_two_ranks_know, wholes, world_size=4):
        assert [part.dtype for part in shared] == [whole.dtype for whole in wholes]
        assert all(map(torch.equal, shared, wholes))


def test_what_is_not_finite_stays_in_its_row(ranks: RankPool) -> None:
    whole = torch.tensor([[1.0], [torch.inf], [-torch.inf], [torch.nan], [2.0]])
    for [shared] in ranks.run(share_what_two_ranks_know, [whole], world_size=4):
        assert torch.equal(shared.isnan(), whole.isnan())
        assert torch.equal(shared.nan_to_num(7.0, 8.0, 9.0), whole.nan_to_num(7.0, 8.0, 9.0))
