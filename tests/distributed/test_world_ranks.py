"""What ranks tell each other: errors, and rows that one rank of each model copy knows."""

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankError, RankPool
from torch import Tensor

from poweropd_megatron.errors import CheckpointError, ConfigError, InputError, UserError
from poweropd_megatron.parallel.world import agreed, own_rows, share_rows

CPU = torch.device("cpu")
ERRORS: dict[int, UserError] = {
    0: ConfigError("first"),
    1: InputError("second"),
    2: CheckpointError("third"),
    3: UserError("fourth"),
}


def agree(failing: list[int]) -> tuple[str, str, int | None, int]:
    """Return the kind and text of the error that this rank saw, its result, and a later sum."""

    def step() -> int:
        if dist.get_rank() in failing:
            raise ERRORS[dist.get_rank()]
        return 10 * dist.get_rank()

    kind, text, result = "", "", None
    try:
        result = agreed(step)
    except UserError as error:
        kind, text = type(error).__name__, str(error)
    after = torch.tensor(1)
    dist.all_reduce(after)
    return kind, text, result, int(after)


@pytest.mark.parametrize(
    ("failing", "kind", "text"),
    [
        ([0], "ConfigError", "first (on rank 0)"),
        ([2], "CheckpointError", "third (on rank 2)"),
        ([1, 3], "InputError", "second (on rank 1)"),
        ([1, 2, 3], "InputError", "second (on rank 1)"),
        ([0, 1, 2, 3], "ConfigError", "first"),
    ],
)
def test_all_ranks_raise_the_first_ranks_error_and_can_go_on(
    failing: list[int], kind: str, text: str, ranks: RankPool
) -> None:
    assert ranks.run(agree, failing, world_size=4) == [(kind, text, None, 4)] * 4


def test_without_an_error_each_rank_has_its_own_result(ranks: RankPool) -> None:
    assert ranks.run(agree, [], world_size=4) == [("", "", 10 * rank, 4) for rank in range(4)]


def agree_on_a_bug() -> None:
    def step() -> None:
        if dist.get_rank() == 1:
            raise ZeroDivisionError("a bug")

    agreed(step)


def test_an_error_of_ours_is_not_taken_for_the_users(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2: (.|\n)*ZeroDivisionError: a bug"):
        ranks.run(agree_on_a_bug, world_size=2)


def share_what_two_ranks_know(dtype: torch.dtype, whole: Tensor) -> Tensor:
    """Ranks 1 and 3 speak, each for its share in reverse; the others hold values that are wrong."""
    rank = dist.get_rank()
    indices = own_rows(len(whole), rank=rank // 2, size=2).flip(0)
    speaks = rank % 2 == 1
    rows = whole[indices] if speaks else torch.full_like(whole[indices], 99)
    return share_rows(rows.to(dtype), indices, tuple(whole.shape), speaks=speaks, device=CPU)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_shared_rows_are_exact_on_every_rank(
    num_rows: int, dtype: torch.dtype, ranks: RankPool
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    whole = (torch.randn(num_rows, 2, 3, generator=generator, dtype=torch.float64) * 1e6).to(dtype)
    for shared in ranks.run(share_what_two_ranks_know, dtype, whole, world_size=4):
        assert shared.dtype == dtype
        assert torch.equal(shared, whole)


def test_what_is_not_finite_stays_in_its_row(ranks: RankPool) -> None:
    whole = torch.tensor([[1.0], [torch.inf], [-torch.inf], [torch.nan], [2.0]])
    for shared in ranks.run(share_what_two_ranks_know, torch.float32, whole, world_size=4):
        assert torch.equal(shared.isnan(), whole.isnan())
        assert torch.equal(shared.nan_to_num(7.0, 8.0, 9.0), whole.nan_to_num(7.0, 8.0, 9.0))
