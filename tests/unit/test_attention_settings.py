"""Attention that can't be had is refused before a model is built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from support.run_settings import small_run

from poweropd_megatron.config.parallel import check_exchanged_heads
from poweropd_megatron.config.schema import ParallelConfig, TrainConfig
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.models import attention_settings
from poweropd_megatron.models.megatron_settings import check_megatron_settings, fields_of
from poweropd_megatron.models.model_inputs import check_kernels


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Transformer Engine be there, and a GPU."""
    monkeypatch.setattr(megatron_te, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def config_with(
    student: dict[str, Any], teacher: dict[str, Any] | None = None, *, context: int = 1
) -> TrainConfig:
    config = small_run(Path("student"))
    config.student.dtype = config.teacher.dtype = "bf16"
    config.student.megatron, config.teacher.megatron = student, teacher or {}
    config.student.parallel.context_parallel_size = context
    return config


def message_of(config: TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_megatron_settings(config)
    return str(caught.value)


def both(backend: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"attention_backend": backend}, {"attention_backend": backend}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("backend", ["auto", "flash", "fused", "local"])
def test_a_backend_of_megatrons_can_be_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_settings, "find_spec", lambda name: name == "flash_attn_3")
    check_megatron_settings(config_with(*both(backend)))
    given = fields_of(TransformerConfig, {"attention_backend": backend})
    assert given == {"attention_backend": AttnBackend[backend]}


def test_another_name_is_refused_with_those_that_exist() -> None:
    assert message_of(config_with(*both("sdpa"))) == (
        "student.megatron.attention_backend must be one of 'flash', 'fused', 'unfused', 'local', "
        "'auto', not 'sdpa'"
    )
    assert "not 5" in message_of(config_with({"attention_backend": 5}))


def test_both_models_have_one_backend_for_megatron_sets_it_for_a_process() -> None:
    message = message_of(config_with({"attention_backend": "local"}))
    assert "student.megatron.attention_backend = 'local'" in message
    assert "teacher.megatron.attention_backend = 'auto'" in message
    check_megatron_settings(config_with(*both("local")))
    check_megatron_settings(config_with({"attention_backend": "auto"}))


@pytest.mark.parametrize("backend", ["flash", "fused", "unfused"])
def test_a_kernel_of_transformer_engines_needs_it(backend: str) -> None:
    assert message_of(config_with(*both(backend))) == (
        f"student.megatron.attention_backend = '{backend}' names a kernel of Transformer Engine's, "
        "but Transformer Engine is not installed: leave it out, for torch's attention"
    )


@pytest.mark.usefixtures("installed")
def test_a_kernel_of_transformer_engines_is_for_bf16() -> None:
    config = config_with(*both("fused"))
    config.student.dtype = config.teacher.dtype = "fp32"
    message = message_of(config)
    assert message.startswith("student.megatron.attention_backend = 'fused' names a kernel")
    assert "for bf16, not fp32" in message


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_model_in_fp32_shares_the_backend_of_the_other_in_its_processes(name: str) -> None:
    config = config_with(*both("fused"))
    getattr(config, name).dtype = "fp32"
    check_megatron_settings(config)
    getattr(config, name).megatron = {}
    assert "so give both models the same" in message_of(config)


@pytest.mark.usefixtures("installed")
def test_models_in_processes_of_their_own_have_backends_of_their_own() -> None:
    config = config_with({"attention_backend": "fused"})
    config.teacher.num_ranks = 1
    check_megatron_settings(config)


@pytest.mark.usefixtures("installed")
def test_unfused_attention_is_refused_for_its_scores() -> None:
    message = message_of(config_with(*both("unfused")))
    assert "'unfused' keeps scores of length x length, rounded to bf16: choose 'flash'" in message


@pytest.mark.usefixtures("installed")
def test_flash_attention_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_settings, "find_spec", lambda name: None)  # noqa: ARG005
    message = message_of(config_with(*both("flash")))
    assert "student.megatron.attention_backend = 'flash' needs flash-attn" in message


@pytest.mark.usefixtures("installed")
def test_how_slices_are_exchanged_can_be_named() -> None:
    for exchange in ("p2p", "a2a"):
        check_megatron_settings(config_with({"cp_comm_type": exchange}, context=2))
    config = config_with({}, {"cp_comm_type": "p2p"})
    config.teacher.parallel.context_parallel_size = 2
    check_megatron_settings(config)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("exchange", ["all_gather", "a2a+p2p", "ring"])
def test_an_exchange_that_is_not_made_here_is_refused(exchange: str) -> None:
    assert message_of(config_with({"cp_comm_type": exchange}, context=2)) == (
        f"student.megatron.cp_comm_type must be 'p2p' or 'a2a', not '{exchange}'"
    )


@pytest.mark.usefixtures("installed")
def test_an_exchange_without_slices_is_refused() -> None:
    message = message_of(config_with({"cp_comm_type": "p2p"}))
    assert "no effect without student.parallel.context_parallel_size > 1" in message


def test_an_exchange_is_transformer_engines() -> None:
    message = message_of(config_with({"cp_comm_type": "p2p"}, context=2))
    assert "but Transformer Engine is not installed: leave it out" in message
    config = config_with(
        {"cp_comm_type": "p2p", "attention_backend": "local"},
        {"attention_backend": "local"},
        context=2,
    )
    assert "but attention_backend is 'local': leave it out" in message_of(config)


@pytest.mark.parametrize(
    ("tensor", "context", "heads", "groups", "words"),
    [
        (1, 2, 8, 4, None),
        (2, 2, 8, 4, None),
        (1, 4, 8, 2, "8 query heads and the 2 key-value heads"),
        (4, 2, 8, 4, "2 query heads and the 1 key-value heads"),
        (8, 2, 16, 4, "2 query heads and the 1 key-value heads"),
    ],
)
def test_ranks_that_exchange_sequences_for_heads_must_divide_the_heads(
    tensor: int, context: int, heads: int, groups: int, words: str | None
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, context_parallel_size=context)
    check_exchanged_heads("student", parallel, {"cp_comm_type": "p2p"}, heads=heads, groups=groups)
    a2a = {"cp_comm_type": "a2a"}
    if words is None:
        check_exchanged_heads("student", parallel, a2a, heads=heads, groups=groups)
        return
    with pytest.raises(ConfigError) as caught:
        check_exchanged_heads("student", parallel, a2a, heads=heads, groups=groups)
    assert words in str(caught.value)
    assert f"student.parallel.context_parallel_size = {context}" in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "variable", "value", "words"),
    [
        ("auto", "NVTE_FLASH_ATTN", "0", "attention_backend = 'auto' makes it 1: unset it"),
        ("fused", "NVTE_FLASH_ATTN", "1", "attention_backend = 'fused' makes it 0: unset it"),
        ("local", "NVTE_UNFUSED_ATTN", "1", "attention_backend = 'local' makes it 0: unset it"),
    ],
)
def test_switches_of_the_environment_must_be_those_that_megatron_sets(
    backend: str, variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)  # a model that was built here set them
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        check_kernels(backend)
    assert str(caught.value).startswith(f"{variable} = {value} in the environment, but ")
    assert words in str(caught.value)
    monkeypatch.setenv(variable, str(1 - int(value)))
    check_kernels(backend)


def test_a_scaling_of_transformer_engines_that_models_do_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NVTE_APPLY_QK_LAYER_SCALING", "1")
    with pytest.raises(ConfigError, match=r"NVTE_APPLY_QK_LAYER_SCALING = 1 .*: unset it"):
        check_kernels()
