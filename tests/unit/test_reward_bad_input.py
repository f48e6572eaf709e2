"""What rewards refuse: always a ValueError that names what doesn't fit."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from poweropd_megatron.ops.rewards import token_reward

ROWS = 3


def refused(arguments: dict[str, Any], *parts: str) -> None:
    """Assert that token_reward raises ValueError with a message that has these parts, in order."""
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts))):
        token_reward(**arguments)


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("square", {}, "kind must be one of power, box_cox, log_ratio, clip, tanh, got 'square'"),
        *(
            (kind, {"a": alpha}, f"alpha must be > 0 and finite in fp32, got {alpha}")
            for kind in ("power", "box_cox")
            for alpha in (0.0, -1.0, math.nan, math.inf, 1e300, 1e-300)
        ),
        *(
            ("tanh", {"a": tau}, f"tau must be > 0 and finite in fp32, got {tau}")
            for tau in (0.0, -1.0, math.nan, math.inf, 1e300, 1e-300)
        ),
        ("clip", {"a": 1.0, "b": -1.0}, "bounds of clip must be ascending, got 1.0 and -1.0"),
        ("clip", {"a": math.nan, "b": 1.0}, "bounds of clip must be ascending, got nan and 1.0"),
        ("clip", {"a": 0.0, "b": math.nan}, "bounds of clip must be ascending, got 0.0 and nan"),
        ("power", {"a": "5"}, "a of power must be a number, got '5'"),
        ("tanh", {"a": None}, "a of tanh must be a number, got None"),
        ("clip", {"a": -1.0, "b": torch.ones(2)}, "b of clip must be a number, got tensor("),
    ],
)
def test_rewards_that_can_not_be_are_refused(
    kind: str, parameters: dict[str, float], message: str
) -> None:
    logp = -torch.ones(ROWS)
    arguments = {"kind": kind, "teacher_logp": logp, "student_logp": logp}
    refused(arguments | parameters, message)


@pytest.mark.parametrize("name", ["teacher_logp", "student_logp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_log_probs_of_another_dtype_are_refused(name: str, dtype: torch.dtype) -> None:
    logp = {"teacher_logp": -torch.ones(ROWS), "student_logp": -torch.ones(ROWS)}
    logp[name] = logp[name].to(dtype)
    refused({"kind": "log_ratio", **logp}, f"{name} must be fp32, got {dtype}")


@pytest.mark.parametrize(
    "student", [torch.ones(2), torch.ones(ROWS, 1), torch.ones(()), torch.ones(3, device="meta")]
)
def test_log_probs_that_are_not_alike_are_refused(student: Tensor) -> None:
    message = f"student_logp {tuple(student.shape)} on {student.device}: they must be alike"
    arguments = {"teacher_logp": torch.ones(ROWS), "student_logp": student}
    refused({"kind": "log_ratio", **arguments}, "teacher_logp is (3,) on cpu", message)


@pytest.mark.parametrize("name", ["teacher_logp", "student_logp"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([-1.0, -1.0, -1.0], "must be a dense strided tensor, got list"),
        (-torch.ones(ROWS).to_sparse(), "must be a dense strided tensor, got torch.sparse_coo"),
        (torch._neg_view(torch.ones(ROWS)), "is a lazily negated view: call .resolve_neg() first"),
    ],
)
def test_log_probs_that_are_not_dense_are_refused(name: str, bad: Any, message: str) -> None:
    logp = {"teacher_logp": -torch.ones(ROWS), "student_logp": -torch.ones(ROWS)} | {name: bad}
    refused({"kind": "log_ratio", **logp}, f"{name} {message}")


def test_log_probs_without_memory_are_refused() -> None:
    logp = torch.ones(ROWS, device="meta")
    arguments = {"kind": "power", "teacher_logp": logp, "student_logp": logp, "a": 1.0}
    refused(arguments, "student_logp is on meta, expected a device with memory")


def test_log_probs_above_zero_are_rewarded_as_they_are() -> None:
    reward = token_reward("power", torch.tensor([1e-7, math.nan]), torch.zeros(2), a=1.0)
    torch.testing.assert_close(reward, torch.tensor([1e-7, math.nan]), equal_nan=True)
