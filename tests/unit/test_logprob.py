"""vocab_parallel_logprob on one rank: as exact as plain torch in the same dtype, against fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from poweropd_megatron.ops.logprob import TokenLogprobs, vocab_parallel_logprob
from poweropd_megatron.parallel.layout import Layout

DTYPES = [torch.float32, torch.bfloat16]

Logprob = Callable[..., TokenLogprobs]


@pytest.fixture
def logprob(layout: Layout) -> Logprob:
    """Return the op over a group of one rank, vocab_size being all columns unless it is given."""

    def call(logits: Tensor, targets: Tensor, vocab_size: int | None = None) -> TokenLogprobs:
        columns = logits.shape[-1] if vocab_size is None else vocab_size
        return vocab_parallel_logprob(
            logits, targets, vocab_size=columns, tp_group=layout.groups.tp
        )

    return call


def batch(
    rows: int,
    columns: int,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, targets (the outermost columns among them) and gradients of both signs."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, columns, generator=generator)).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[0], targets[-1] = 0, columns - 1
    return logits, targets, torch.randn(rows, generator=generator)


def exact(logits: Tensor, targets: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropies and the gradient of the logits in fp64."""
    logits = logits.detach().double().requires_grad_()
    logp = logits.log_softmax(dim=1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(dim=1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    [gradient] = torch.autograd.grad(chosen, logits, upstream.double())
    return chosen.detach(), entropy.detach(), gradient


def error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "scale"), [(64, 1500, 3.0), (200, 33, 1.0), (40, 700, 30.0)]
)
def test_no_more_than_twice_the_error_of_plain_torch(
    logprob: Logprob, dtype: torch.dtype, rows: int, columns: int, scale: float
) -> None:
    logits, targets, upstream = batch(rows, columns, dtype=dtype, scale=scale)
    logp_true, entropy_true, gradient_true = exact(logits, targets, upstream)

    plain_logits = logits.clone().requires_grad_()
    plain_all = plain_logits.log_softmax(dim=1)
    plain_logp = plain_all.gather(1, targets[:, None])[:, 0]
    plain_logp.backward(upstream.to(dtype))
    plain_entropy = -(plain_all.exp() * plain_all).sum(dim=1)

    logits.requires_grad_()
    ours = logprob(logits, targets)
    ours.logp_N.backward(upstream)
    assert ours.logp_N.dtype == ours.entropy_N.dtype == torch.float32
    assert logits.grad.dtype == dtype
    assert error(ours.logp_N, logp_true) <= 2 * error(plain_logp, logp_true)
    assert error(ours.entropy_N, entropy_true) <= 2 * error(plain_entropy, entropy_true)
    assert error(logits.grad, gradient_true) <= 2 * error(plain_logits.grad, gradient_true)


def test_bf16_logits_give_fp32_log_probs(logprob: Logprob) -> None:
    logits, targets, upstream = batch(64, 1000, dtype=torch.bfloat16)
    logp_true, entropy_true, _ = exact(logits, targets, upstream)
    ours = logprob(logits, targets)
    assert error(ours.logp_N, logp_true) < 5e-6
    assert error(ours.entropy_N, entropy_true) < 5e-6


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_an_offset_of_all_logits_changes_nothing(logprob: Logprob, offset: float) -> None:
    logits, targets, upstream = batch(32, 200)
    logits = (logits * 64).round() / 64
    shifted = (logits + offset).requires_grad_()
    logits.requires_grad_()
    plain, moved = logprob(logits, targets), logprob(shifted, targets)
    assert torch.equal(moved.logp_N, plain.logp_N)
    assert torch.equal(moved.entropy_N, plain.entropy_N)
    plain.logp_N.backward(upstream)
    moved.logp_N.backward(upstream)
    assert torch.equal(shifted.grad, logits.grad)


@pytest.mark.parametrize("magnitude", [1000.0, 3e38])
def test_the_most_and_the_least_likely_token_stay_finite(
    logprob: Logprob, magnitude: float
) -> None:
    logits = torch.tensor([[magnitude, 0.0, 0.0, 0.0]]).repeat(2, 1).requires_grad_()
    ours = logprob(logits, torch.tensor([0, 2]))
    assert ours.logp_N.tolist() == pytest.approx([0.0, -magnitude])
    assert ours.entropy_N.tolist() == [0.0, 0.0]
    ours.logp_N.sum().backward()
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 1.0, 0.0]]


def test_a_token_of_probability_zero_has_log_prob_minus_infinity_and_no_nan(
    logprob: Logprob,
) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, -torch.inf, 1.0]], requires_grad=True)
    ours = logprob(logits, torch.tensor([1, 2]))
    likely = torch.tensor([0.0, 1.0]).softmax(0)
    assert ours.logp_N.tolist() == pytest.approx([-torch.inf, likely[1].log().item()])
    entropy = -(likely * likely.log()).sum().item()
    assert ours.entropy_N.tolist() == pytest.approx([entropy, entropy])
    ours.logp_N[1].backward()
    expected = [0.0] * 3, [-likely[0].item(), 0.0, likely[0].item()]
    assert logits.grad.tolist() == [pytest.approx(row, abs=1e-7) for row in expected]


def test_tokens_without_upstream_gradient_have_exactly_none(logprob: Logprob) -> None:
    logits, targets, upstream = batch(16, 50)
    upstream[::3] = 0.0
    _, _, truth = exact(logits, targets, upstream)
    logits.requires_grad_()
    logprob(logits, targets).logp_N.backward(upstream)
    assert not logits.grad[::3].any()
    torch.testing.assert_close(logits.grad.double(), truth, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_row_sum_to_zero(logprob: Logprob) -> None:
    logits, targets, upstream = batch(32, 300)
    logits.requires_grad_()
    logprob(logits, targets).logp_N.backward(100 * upstream)
    assert (logits.grad.double().sum(dim=1).abs() < 100 * 1e-5).all()


@pytest.mark.parametrize("padding", [1e30, -1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_columns_take_no_part_and_get_no_gradient(
    logprob: Logprob, padding: float, dtype: torch.dtype
) -> None:
    logits, targets, upstream = batch(24, 61, dtype=dtype)
    padded = torch.cat([logits, torch.full((24, 3), padding, dtype=dtype)], dim=1).requires_grad_()
    logits.requires_grad_()
    bare, ours = logprob(logits, targets), logprob(padded, targets, vocab_size=61)
    assert torch.equal(ours.logp_N, bare.logp_N)
    assert torch.equal(ours.entropy_N, bare.entropy_N)
    bare.logp_N.backward(upstream)
    ours.logp_N.backward(upstream)
    assert torch.equal(padded.grad[:, :61], logits.grad)
    assert not padded.grad[:, 61:].any()


def test_the_logits_are_left_as_they_were_and_a_second_backward_agrees(logprob: Logprob) -> None:
    logits, targets, upstream = batch(8, 40)
    before = logits.clone()
    logits.requires_grad_()
    logp = logprob(logits, targets).logp_N
    [first] = torch.autograd.grad(logp, logits, upstream, retain_graph=True)
    [second] = torch.autograd.grad(logp, logits, upstream)
    assert torch.equal(logits, before)
    assert torch.equal(first, second)


def test_rows_apart_and_strided_gradients_give_the_same(logprob: Logprob) -> None:
    logits, targets, _ = batch(10, 30)
    apart = torch.cat([logits, logits + 1], dim=1)[:, :30].requires_grad_()
    logits.requires_grad_()
    logprob(apart, targets).logp_N.sum().backward()
    logprob(logits, targets).logp_N.backward(torch.ones(10))
    assert torch.equal(apart.grad, logits.grad)


def test_rows_that_share_memory_are_refused_where_the_gradient_overwrites_them(
    layout: Layout,
) -> None:
    arguments = {"vocab_size": 30, "tp_group": layout.groups.tp}
    logits, targets, _ = batch(1, 30)
    expanded = logits.expand(4, 30)
    vocab_parallel_logprob(expanded, targets.expand(4), **arguments)
    with pytest.raises(ValueError, match="logits_NVp: rows of 30 columns with stride 0 overlap"):
        vocab_parallel_logprob(expanded, targets.expand(4), **arguments, inplace_backward=True)


def test_logits_with_a_stride_along_the_columns_are_refused(logprob: Logprob) -> None:
    logits, targets, _ = batch(10, 30)
    strided = torch.stack([logits, logits + 1], dim=-1)[..., 0]
    with pytest.raises(ValueError, match="logits_NVp must have stride 1 along the columns, got 2"):
        logprob(strided, targets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_give_no_log_probs_and_a_gradient(logprob: Logprob, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 3, dtype=dtype, requires_grad=True)
    hidden = torch.empty(0, 3, dtype=dtype)
    ours = logprob(hidden @ weight.T, torch.empty(0, dtype=torch.int64))
    assert ours.logp_N.shape == ours.entropy_N.shape == (0,)
    ours.logp_N.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_the_entropy_of_equal_logits_is_that_of_the_uniform_distribution(logprob: Logprob) -> None:
    logits = torch.full((3, 128), -7.5, requires_grad=True)
    ours = logprob(logits, torch.tensor([0, 5, 127]))
    torch.testing.assert_close(ours.entropy_N, torch.full((3,), 128.0).log())
    torch.testing.assert_close(ours.logp_N, -torch.full((3,), 128.0).log())
    assert not ours.entropy_N.requires_grad


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 5], r"targets_N must lie in \[0, 5\) or be -100, got 5 in row 1"),
        ([-1, 4], r"targets_N must lie in \[0, 5\) or be -100, got -1 in row 0"),
        ([0, 1, 2], r"targets_N must be \[2\] int64, got \(3,\) torch.int64"),
    ],
)
def test_targets_outside_the_vocabulary_or_of_another_shape_are_refused(
    logprob: Logprob, targets: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        logprob(torch.zeros(2, 6), torch.tensor(targets), vocab_size=5)


def test_logits_that_are_no_matrix_are_refused(logprob: Logprob) -> None:
    with pytest.raises(ValueError, match=r"logits_NVp must be \[N, Vp\], got \(2, 3, 6\)"):
        logprob(torch.zeros(2, 3, 6), torch.zeros(2, dtype=torch.int64))
