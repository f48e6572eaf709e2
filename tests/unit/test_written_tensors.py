"""Autograd notices what the operations write: it refuses a backward that needs the old values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from poweropd_megatron.ops.backends import compiled
from poweropd_megatron.ops.rows import row_grad_, row_stats

TARGETS_N = torch.tensor([0, 1, 2])
CUT = {"first_column": 0, "vocab_size": 5}


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the compiled kernels, then plain torch."""
    monkeypatch.setenv("POWEROPD_OPS", "torch" if request.param == "torch" else "")
    if request.param == "compiled" and isinstance(compiled("cpu"), str):
        pytest.skip("no compiled module")


def write_gradient(logits_NVp: Tensor) -> None:
    scales = {name: torch.ones(3) for name in ("maximum_N", "inverse_sum_N", "grad_N")}
    row_grad_(logits_NVp, TARGETS_N, **scales, **CUT)


def write_states(stats_N4: Tensor) -> None:
    row_stats(torch.zeros(3, 5), TARGETS_N, stats_N4=stats_N4, **CUT)


@pytest.mark.parametrize(("write", "width"), [(write_gradient, 5), (write_states, 4)])
def test_a_backward_that_needs_what_was_overwritten_is_refused(
    write: Callable[[Tensor], None], width: int
) -> None:
    kept = 2 * torch.ones(3, width, requires_grad=True)
    loss = (kept * kept).sum()
    write(kept.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_leaves_of_autograd_are_not_written() -> None:
    leaf = torch.ones(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match="logits_NVp is a leaf that requires grad"):
        write_gradient(leaf)
    assert (leaf == 1).all()


def test_states_of_logits_in_a_graph_are_detached() -> None:
    assert not row_stats(2 * torch.ones(3, 5, requires_grad=True), TARGETS_N, **CUT).requires_grad
