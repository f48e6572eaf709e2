"""Where the LM head leaves its gradients: main_grad, autograd, or nowhere; and what it allocates.

Shapes: N tokens, H hidden, Vp columns of the vocabulary with padding.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.lm_head_cases import HEADS, Batch, Case, error, exact, leaves, loss_of, power
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from poweropd_megatron.ops import lm_head_tiles
from poweropd_megatron.ops.lm_head import score
from poweropd_megatron.ops.lm_head_tiles import LMHead, logit_tiles
from poweropd_megatron.parallel.layout import Layout

ROUNDING = 5e-6
"""Norm of the difference over the norm of what fp32 rounds; a third of it is seen."""
BF16_ROUNDING = 4e-3
DTYPES = [torch.float32, torch.bfloat16]
CASE = Case(with_ignored=True)

MakeHead = Callable[[Tensor], LMHead]


@pytest.fixture(autouse=True)
def _tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make many tiles and chunks, whose shares of a gradient have to be added up."""
    monkeypatch.setattr(lm_head_tiles, "TILE_ROWS", {"cpu": 7})
    monkeypatch.setattr(lm_head_tiles, "TILE_BYTES", {"cpu": 4 * 7 * 128})
    monkeypatch.setattr(lm_head_tiles, "CHUNK_BYTES", {"cpu": 4 * 311 * 5})


@pytest.fixture
def make_head(layout: Layout) -> MakeHead:
    def make(weight_VpH: Tensor) -> LMHead:
        return LMHead(weight_VpH=weight_VpH, vocab_size=CASE.vocab_size, tp_group=layout.groups.tp)

    return make


def with_main_grad(batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any, Tensor]:
    """Return leaves whose weight has a main_grad with another gradient in it, and a copy of that.

    The weight is a parameter, to which attributes stick as to Megatron's.
    """
    hidden_NH, weight_VpH = leaves(batch)
    parameter: Any = torch.nn.Parameter(weight_VpH.detach())
    generator = torch.Generator().manual_seed(7)
    parameter.main_grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return hidden_NH, parameter, parameter.main_grad.clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HEADS)
def test_the_weights_gradient_is_added_to_an_fp32_main_grad_in_fp32(
    make_head: MakeHead, kind: str, dtype: torch.dtype
) -> None:
    batch = Case(dtype=dtype, with_ignored=True).batch()
    truth = exact(CASE, batch)
    hidden_NH, weight, before = with_main_grad(batch)
    loss_of(kind, hidden_NH, make_head(weight), batch, power)[0].backward()
    assert weight.grad is None
    assert error(weight.main_grad - before, truth.weight_grad_VpH) <= ROUNDING
    assert torch.equal(weight.main_grad[CASE.vocab_size :], before[CASE.vocab_size :])
    assert error(hidden_NH.grad, truth.hidden_grad_NH) <= (
        ROUNDING if dtype == torch.float32 else BF16_ROUNDING
    )


@pytest.mark.parametrize("kind", HEADS)
def test_micro_batches_add_up_in_main_grad(make_head: MakeHead, kind: str) -> None:
    batch = CASE.batch()
    hidden_NH, weight, before = with_main_grad(batch)
    for rows in (slice(0, 20), slice(20, 20), slice(20, None)):
        part = Batch(hidden_NH[rows], weight, batch.targets_N[rows], batch.teacher_logp_N[rows])
        loss_of(kind, part.hidden_NH, make_head(weight), part, power)[0].backward()
    truth = exact(CASE, batch)
    assert error(weight.main_grad - before, truth.weight_grad_VpH) <= ROUNDING
    assert error(hidden_NH.grad, truth.hidden_grad_NH) <= ROUNDING


@pytest.mark.parametrize("kind", HEADS)
def test_a_main_grad_in_bf16_is_left_to_autograd(make_head: MakeHead, kind: str) -> None:
    batch = CASE.batch()
    hidden_NH, weight, before = with_main_grad(batch, torch.bfloat16)
    (3 * loss_of(kind, hidden_NH, make_head(weight), batch, power)[0]).backward()
    assert torch.equal(weight.main_grad, before)
    truth = exact(CASE, batch)
    assert error(weight.grad, 3 * truth.weight_grad_VpH) <= ROUNDING
    assert error(hidden_NH.grad, 3 * truth.hidden_grad_NH) <= ROUNDING


@pytest.mark.parametrize("kind", HEADS)
def test_the_gradient_is_added_to_what_autograd_already_has(make_head: MakeHead, kind: str) -> None:
    batch = CASE.batch()
    hidden_NH, weight_VpH = leaves(batch)
    hidden_NH.grad, weight_VpH.grad = torch.ones_like(hidden_NH), torch.ones_like(weight_VpH)
    loss_of(kind, hidden_NH, make_head(weight_VpH), batch, power)[0].backward()
    truth = exact(CASE, batch)
    assert error(hidden_NH.grad - 1, truth.hidden_grad_NH) <= ROUNDING
    assert error(weight_VpH.grad - 1, truth.weight_grad_VpH) <= ROUNDING


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HEADS)
def test_a_scaled_loss_scales_the_gradients(
    make_head: MakeHead, kind: str, dtype: torch.dtype
) -> None:
    batch = Case(dtype=dtype, with_ignored=True).batch()
    hidden_NH, weight_VpH = leaves(batch)
    (-0.3 * loss_of(kind, hidden_NH, make_head(weight_VpH), batch, power)[0]).backward()
    truth, rounding = exact(CASE, batch), (ROUNDING if dtype == torch.float32 else BF16_ROUNDING)
    assert error(hidden_NH.grad, -0.3 * truth.hidden_grad_NH) <= rounding
    assert error(weight_VpH.grad, -0.3 * truth.weight_grad_VpH) <= rounding


@pytest.mark.parametrize("kind", ["recompute", "materialized"])
def test_a_scaled_loss_scales_what_main_grad_gets(make_head: MakeHead, kind: str) -> None:
    batch = CASE.batch()
    hidden_NH, weight, before = with_main_grad(batch)
    (4 * loss_of(kind, hidden_NH, make_head(weight), batch, power)[0]).backward()
    assert error(weight.main_grad - before, 4 * exact(CASE, batch).weight_grad_VpH) <= ROUNDING


def test_the_fused_loss_refuses_to_be_scaled_where_main_grad_has_the_gradient(
    make_head: MakeHead,
) -> None:
    batch = CASE.batch()
    hidden_NH, weight, _ = with_main_grad(batch)
    loss, *_ = loss_of("fused", hidden_NH, make_head(weight), batch, power)
    with pytest.raises(RuntimeError, match="gradient is in main_grad: the loss can't be scaled"):
        (2 * loss).backward()
    assert hidden_NH.grad is None


def test_the_fused_loss_refuses_a_second_backward_where_main_grad_has_the_gradient(
    make_head: MakeHead,
) -> None:
    batch = CASE.batch()
    hidden_NH, weight, _ = with_main_grad(batch)
    loss, *_ = loss_of("fused", hidden_NH, make_head(weight), batch, power)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can't be differentiated a second time"):
        loss.backward()


@pytest.mark.parametrize("kind", ["fused", "recompute"])
def test_a_second_backward_gives_the_same_gradients_again(make_head: MakeHead, kind: str) -> None:
    batch = CASE.batch()
    tensors = leaves(batch)
    loss, *_ = loss_of(kind, tensors[0], make_head(tensors[1]), batch, power)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_second_backward_over_logits_that_the_first_overwrote_is_refused(
    make_head: MakeHead,
) -> None:
    batch = CASE.batch()
    hidden_NH, weight_VpH = leaves(batch)
    loss, *_ = loss_of("materialized", hidden_NH, make_head(weight_VpH), batch, power)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", HEADS)
def test_without_grad_mode_nothing_is_differentiated_and_main_grad_stays(
    make_head: MakeHead, kind: str
) -> None:
    batch = CASE.batch()
    hidden_NH, weight, before = with_main_grad(batch)
    with torch.no_grad():
        loss, logp_N, _ = loss_of(kind, hidden_NH, make_head(weight), batch, power)
    score(hidden_NH, make_head(weight), batch.targets_N)
    assert not loss.requires_grad
    assert torch.equal(weight.main_grad, before)
    truth = exact(CASE, batch)
    assert error(loss, truth.loss) <= ROUNDING
    assert error(logp_N, truth.logp_N) <= ROUNDING


@pytest.mark.parametrize("has_main_grad", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_hidden_states_may_be_constant(make_head: MakeHead, kind: str, has_main_grad: bool) -> None:
    batch = CASE.batch()
    _, weight, before = with_main_grad(batch)
    if not has_main_grad:
        del weight.main_grad
    loss_of(kind, batch.hidden_NH, make_head(weight), batch, power)[0].backward()
    found = weight.main_grad - before if has_main_grad else weight.grad
    assert error(found, exact(CASE, batch).weight_grad_VpH) <= ROUNDING


@pytest.mark.parametrize("kind", HEADS)
def test_a_frozen_weight_and_its_main_grad_stay_as_they_are(make_head: MakeHead, kind: str) -> None:
    batch = CASE.batch()
    hidden_NH, weight, before = with_main_grad(batch)
    weight.requires_grad_(False)
    (2 * loss_of(kind, hidden_NH, make_head(weight), batch, power)[0]).backward()
    assert torch.equal(weight.main_grad, before)
    assert weight.grad is None
    assert error(hidden_NH.grad, 2 * exact(CASE, batch).hidden_grad_NH) <= ROUNDING


@pytest.mark.parametrize("kind", HEADS)
def test_inputs_are_left_as_they_were_whatever_their_strides(
    make_head: MakeHead, kind: str
) -> None:
    batch = CASE.batch()
    truth = exact(CASE, batch)
    hidden_NH = torch.stack([batch.hidden_NH, batch.hidden_NH], 2)[..., 0].requires_grad_()
    weight_VpH = batch.weight_VpH.t().contiguous().t().requires_grad_()
    apart = Batch(
        hidden_NH,
        weight_VpH,
        torch.stack([batch.targets_N, batch.targets_N], 1)[:, 0],
        torch.stack([batch.teacher_logp_N, batch.teacher_logp_N], 1)[:, 0],
    )
    loss_of(kind, hidden_NH, make_head(weight_VpH), apart, power)[0].backward()
    assert error(hidden_NH.grad, truth.hidden_grad_NH) <= ROUNDING
    assert error(weight_VpH.grad, truth.weight_grad_VpH) <= ROUNDING
    assert all(torch.equal(*pair) for pair in zip(apart, batch, strict=True))


class LargestTensor(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.add(func.overloadpacket.__name__)
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.num_elements = max(self.num_elements, value.numel())
        return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["score", *HEADS])
def test_only_the_materialized_head_ever_holds_the_logits_of_all_tokens(
    make_head: MakeHead, kind: str, dtype: torch.dtype
) -> None:
    case = Case(dtype=dtype, num_tokens=600)
    batch = case.batch()
    hidden_NH, weight_VpH = leaves(batch)
    with LargestTensor() as seen:
        if kind == "score":
            score(hidden_NH, make_head(weight_VpH), batch.targets_N, with_entropy=True)
        else:
            loss_of(kind, hidden_NH, make_head(weight_VpH), batch, power)[0].backward()
            assert "addmm_" in seen.operations, "the backward is seen"
    num_logits = case.num_tokens * case.padded_size
    if kind == "materialized":
        assert seen.num_elements == num_logits
    else:
        assert seen.num_elements <= max(hidden_NH.numel(), weight_VpH.numel()) < num_logits / 10


@pytest.mark.parametrize("kind", ["score", "fused"])
def test_a_few_tokens_never_widen_the_whole_bf16_weight(
    kind: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(
        dtype=torch.bfloat16, num_tokens=3, hidden_size=64, vocab_size=5000, padded_size=5000
    )
    monkeypatch.setattr(lm_head_tiles, "TILE_BYTES", {"cpu": 4 * 64 * 128})
    monkeypatch.setattr(lm_head_tiles, "CHUNK_BYTES", {"cpu": 4 * 5000 * 3})
    batch = case.batch()
    head = LMHead(weight_VpH=batch.weight_VpH, vocab_size=5000, tp_group=layout.groups.tp)
    with torch.no_grad(), LargestTensor() as seen:
        if kind == "score":
            score(batch.hidden_NH, head, batch.targets_N)
        else:
            loss_of(kind, batch.hidden_NH, head, batch, power)
    assert seen.num_elements <= max(64 * 128, 3 * 5000) < batch.weight_VpH.numel() / 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_lie_in_one_place_with_one_widened_weight(
    make_head: MakeHead, dtype: torch.dtype
) -> None:
    batch = Case(dtype=dtype).batch()
    head = make_head(batch.weight_VpH)
    tiles = list(logit_tiles(batch.hidden_NH, head))
    assert len(tiles) > 4
    assert len({tile.logits.data_ptr() for tile in tiles}) == 1
    num_weights = len({tile.weight.data_ptr() for tile in tiles})
    assert num_weights == (1 if dtype == torch.bfloat16 else len({t.columns.start for t in tiles}))
