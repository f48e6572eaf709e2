"""What the LM head refuses: always a ValueError that says what was given and what was expected."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.lm_head_cases import Batch, Case, leaves, power
from torch import Tensor

from poweropd_megatron.ops.fused_policy_gradient import fused_policy_gradient
from poweropd_megatron.ops.lm_head import materialized_logprob, recomputed_logprob, score
from poweropd_megatron.ops.lm_head_tiles import LMHead
from poweropd_megatron.ops.logprob import vocab_parallel_logprob
from poweropd_megatron.parallel.layout import Layout

CASE = Case(num_tokens=6, hidden_size=4, vocab_size=10, padded_size=12)

Call = Callable[[Tensor, LMHead, Batch], Any]

CALLS: dict[str, Call] = {
    "score": lambda hidden_NH, head, batch: score(hidden_NH, head, batch.targets_N),
    "recompute": lambda hidden_NH, head, batch: recomputed_logprob(
        hidden_NH, head, batch.targets_N
    ),
    "materialized": lambda hidden_NH, head, batch: materialized_logprob(
        hidden_NH, head, batch.targets_N
    ),
    "fused": lambda hidden_NH, head, batch: fused_policy_gradient(
        hidden_NH, head, batch.targets_N, batch.teacher_logp_N, power
    ),
}


@pytest.fixture
def head(layout: Layout) -> LMHead:
    _, weight_VpH = leaves(CASE.batch())
    return LMHead(weight_VpH=weight_VpH, vocab_size=CASE.vocab_size, tp_group=layout.groups.tp)


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


BAD_WEIGHTS: dict[str, tuple[Tensor, str]] = {
    "fp16": (
        torch.ones(12, 4).half(),
        "weight_VpH must be [Vp, H] fp32 or bf16, got (12, 4) torch",
    ),
    "fp64": (torch.ones(12, 4).double(), "got (12, 4) torch.float64"),
    "int": (torch.ones(12, 4).int(), "got (12, 4) torch.int32"),
    "a vector": (torch.ones(4), "weight_VpH must be [Vp, H] fp32 or bf16, got (4,) torch.float32"),
    "another width": (torch.ones(12, 5), "hidden_NH must be [N, 5], got (6, 4)"),
    "bf16": (torch.ones(12, 4).bfloat16(), "weight_VpH torch.bfloat16 on cpu: they must be alike"),
    "elsewhere": (torch.ones(12, 4, device="meta"), "torch.float32 on meta: they must be alike"),
    "sparse": (torch.ones(12, 4).to_sparse(), "weight_VpH must be a dense strided tensor, got"),
    "negated": (torch._neg_view(torch.ones(12, 4)), "weight_VpH is a lazily negated view"),
    "too few columns": (
        torch.ones(9, 4),
        "vocab_size must be 1 to 9, which is 9 columns on each of 1 ranks, got 10",
    ),
}


@pytest.mark.parametrize("bad", BAD_WEIGHTS)
@pytest.mark.parametrize("call", CALLS)
def test_a_weight_that_does_not_fit_is_refused(call: str, bad: str, head: LMHead) -> None:
    weight_VpH, message = BAD_WEIGHTS[bad]
    batch, worse = CASE.batch(), replace(head, weight_VpH=weight_VpH)
    refused(lambda: CALLS[call](batch.hidden_NH, worse, batch), message)


@pytest.mark.parametrize(
    ("hidden_NH", "message"),
    [
        (torch.ones(4), "hidden_NH must be [N, 4], got (4,)"),
        (torch.ones(6, 1, 4), "hidden_NH must be [N, 4], got (6, 1, 4)"),
        (torch.ones(6, 5), "hidden_NH must be [N, 4], got (6, 5)"),
        (torch.ones(6, 4).half(), "hidden_NH is torch.float16 on cpu, weight_VpH torch.float32"),
        (torch.ones(6, 4).bfloat16(), "hidden_NH is torch.bfloat16 on cpu, weight_VpH"),
        (torch.ones(6, 4, device="meta"), "hidden_NH is torch.float32 on meta, weight_VpH"),
        (torch.ones(7, 4), "targets_N must be [7] int64, got (6,)"),
        (torch.ones(6, 4).to_sparse(), "hidden_NH must be a dense strided tensor, got torch.spar"),
        ([1.0], "hidden_NH must be a dense strided tensor, got list"),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_hidden_states_that_do_not_fit_are_refused(
    call: str, hidden_NH: Tensor, message: str, head: LMHead
) -> None:
    refused(lambda: CALLS[call](hidden_NH, head, CASE.batch()), message)


@pytest.mark.parametrize(
    ("targets_N", "message"),
    [
        (torch.full((6,), 10), "targets_N must lie in [0, 10) or be -100, got 10 in row 0"),
        (torch.full((6,), -1), "targets_N must lie in [0, 10) or be -100, got -1 in row 0"),
        (torch.ones(6), "targets_N must be [6] int64, got (6,) torch.float32"),
        (torch.ones(6, 1).long(), "targets_N must be [6] int64, got (6, 1) torch.int64"),
        (torch.ones(6, device="meta").long(), "targets_N is on meta, expected cpu"),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_targets_that_do_not_fit_are_refused(
    call: str, targets_N: Tensor, message: str, head: LMHead
) -> None:
    batch = CASE.batch()._replace(targets_N=targets_N)
    refused(lambda: CALLS[call](batch.hidden_NH, head, batch), message)


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("call", CALLS)
def test_logits_of_another_dtype_than_fp32_or_the_weights_are_refused(
    call: str, logits_dtype: torch.dtype, head: LMHead
) -> None:
    batch, worse = CASE.batch(), replace(head, logits_dtype=logits_dtype)
    message = f"logits_dtype must be fp32 or the weight's torch.float32, got {logits_dtype}"
    refused(lambda: CALLS[call](batch.hidden_NH, worse, batch), message)


@pytest.mark.parametrize("call", CALLS)
def test_tensors_without_memory_are_refused(call: str, head: LMHead) -> None:
    batch = Batch(*(tensor.to("meta") for tensor in CASE.batch()))
    worse = replace(head, weight_VpH=batch.weight_VpH)
    message = "targets_N is on meta, expected a device with memory"
    refused(lambda: CALLS[call](batch.hidden_NH, worse, batch), message)


@pytest.mark.parametrize(
    ("main_grad", "message"),
    [
        (torch.zeros(1, 4), "must be [12, 4], got (1, 4)"),
        (torch.zeros(48), "must be [12, 4], got (48,)"),
        (torch.zeros(12, 4).double(), "must be fp32 or bf16, got torch.float64"),
        (torch.zeros(12, 4, device="meta"), "is on meta, expected cpu"),
        (torch.zeros(12, 4).to_sparse(), "must be a dense strided tensor, got torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_a_main_grad_that_does_not_fit_is_refused(
    call: str, main_grad: Tensor, message: str, head: LMHead
) -> None:
    batch, weight = CASE.batch(), torch.nn.Parameter(head.weight_VpH.detach())
    weight.main_grad = main_grad
    worse = replace(head, weight_VpH=weight)
    refused(
        lambda: CALLS[call](batch.hidden_NH, worse, batch), f"main_grad of weight_VpH {message}"
    )


@pytest.mark.parametrize("vocab_size", [4.5, True, 2**31])
@pytest.mark.parametrize("call", CALLS)
def test_a_vocabulary_that_is_no_number_of_tokens_is_refused(
    call: str, vocab_size: float, head: LMHead
) -> None:
    batch, worse = CASE.batch(), replace(head, vocab_size=vocab_size)
    refused(lambda: CALLS[call](batch.hidden_NH, worse, batch), f"got {vocab_size}")


BAD_FP32: dict[str, tuple[Tensor, str]] = {
    "bf16": (torch.ones(6).bfloat16(), "must be [6] fp32, got (6,) torch.bfloat16"),
    "fp64": (torch.ones(6).double(), "must be [6] fp32, got (6,) torch.float64"),
    "int": (torch.ones(6).long(), "must be [6] fp32, got (6,) torch.int64"),
    "one for all": (torch.ones(()), "must be [6] fp32, got () torch.float32"),
    "a column": (torch.ones(6, 1), "must be [6] fp32, got (6, 1) torch.float32"),
    "too few": (torch.ones(5), "must be [6] fp32, got (5,) torch.float32"),
    "elsewhere": (torch.ones(6, device="meta"), "is on meta, expected cpu"),
    "negated": (torch._neg_view(torch.ones(6)), "is a lazily negated view: call .resolve_neg()"),
    "nothing": (None, "must be a dense strided tensor, got NoneType"),
}


@pytest.mark.parametrize("bad", BAD_FP32)
def test_log_probs_of_the_teacher_that_do_not_fit_are_refused(bad: str, head: LMHead) -> None:
    values_N, message = BAD_FP32[bad]
    batch = CASE.batch()._replace(teacher_logp_N=values_N)
    refused(lambda: CALLS["fused"](batch.hidden_NH, head, batch), f"teacher_logp_N {message}")


@pytest.mark.parametrize("what", ["reward", "weight"])
@pytest.mark.parametrize("bad", BAD_FP32)
def test_what_functions_return_and_does_not_fit_is_refused_before_it_reaches_main_grad(
    bad: str, what: str, head: LMHead
) -> None:
    values_N, message = BAD_FP32[bad]
    functions = {"reward": power, "weight": None, what: lambda _first, _second: values_N}
    batch, weight = CASE.batch(), torch.nn.Parameter(head.weight_VpH.detach())
    weight.main_grad = torch.zeros_like(weight.data)
    refused(
        lambda: fused_policy_gradient(
            batch.hidden_NH,
            replace(head, weight_VpH=weight),
            batch.targets_N,
            batch.teacher_logp_N,
            **functions,
        ),
        f"what {what} returns {message}",
    )
    assert not weight.main_grad.any()


@pytest.mark.parametrize("vocab_size", [0, 13])
def test_a_vocabulary_that_the_columns_can_not_hold_is_refused(
    vocab_size: int, layout: Layout
) -> None:
    """Else a target that no rank has would get log-prob -inf."""
    message = f"got {vocab_size}"
    targets_N = torch.full((2,), -100)
    refused(
        lambda: vocab_parallel_logprob(
            torch.zeros(2, 12), targets_N, vocab_size=vocab_size, tp_group=layout.groups.tp
        ),
        message,
    )


@pytest.mark.parametrize("shape", [(), (12,), (2, 2, 12)])
def test_logits_that_are_no_matrix_are_refused(shape: tuple[int, ...], layout: Layout) -> None:
    refused(
        lambda: vocab_parallel_logprob(
            torch.zeros(shape), torch.zeros(2).long(), vocab_size=12, tp_group=layout.groups.tp
        ),
        f"logits_NVp must be [N, Vp], got {shape}",
    )
