"""Which kernels work on a device: the compiled ones, plain torch if asked, nothing by mistake."""

from pathlib import Path

import pytest
import torch
from support.run_settings import small_run

from poweropd_megatron.errors import ConfigError
from poweropd_megatron.ops import backends, torch_rows
from poweropd_megatron.ops.compiled_rows import CompiledRows
from poweropd_megatron.ops.rewards import token_reward
from poweropd_megatron.ops.rows import combine, row_grad_, row_stats
from poweropd_megatron.train.inputs import read_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [None, ""])
def test_the_compiled_kernels_are_the_default(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POWEROPD_OPS", raising=False)
    if value is not None:
        monkeypatch.setenv("POWEROPD_OPS", value)
    if isinstance(backends.compiled("cpu"), str):
        pytest.skip("no compiled module")
    assert isinstance(backends.kernels_for(torch.zeros(1)), CompiledRows)
    assert backends.describe(CPU) == (True, "kernels: compiled, for cpu")


def test_plain_torch_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWEROPD_OPS", "torch")
    assert backends.kernels_for(torch.zeros(1)) is torch_rows
    assert backends.describe(CPU) == (True, "kernels: plain torch, as POWEROPD_OPS=torch asks")


def test_a_device_without_compiled_kernels_gets_plain_torch_and_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("POWEROPD_OPS", raising=False)
    assert backends.kernels_for(torch.zeros(1, device="meta")) is torch_rows
    is_expected, line = backends.describe(torch.device("meta"))
    assert not is_expected
    assert "plain torch" in line
    assert "there are none for meta" in line


@pytest.mark.parametrize("value", ["garbage", "Torch", "cpu", "0"])
def test_any_other_choice_is_refused_by_every_operation_and_before_a_run(
    value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POWEROPD_OPS", value)
    targets_N, ones_N = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    logits = {"first_column": 0, "vocab_size": 3}
    calls = [
        lambda: row_stats(torch.zeros(2, 3), targets_N, **logits),
        lambda: combine(torch.zeros(1, 2, 4), targets_N),
        lambda: row_grad_(
            torch.zeros(2, 3),
            targets_N,
            maximum_N=ones_N,
            inverse_sum_N=ones_N,
            grad_N=ones_N,
            **logits,
        ),
        lambda: token_reward("log_ratio", ones_N, ones_N),
        lambda: backends.describe(CPU),
    ]
    message = f"^POWEROPD_OPS={value}: expected torch, or leave it unset$"
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ConfigError, match=message):
        read_inputs(small_run(tmp_path), world_size=1)
