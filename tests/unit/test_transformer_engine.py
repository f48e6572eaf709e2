"""Which models get Transformer Engine's attention, and what that attention is given.

Transformer Engine needs CUDA: a stand-in takes its place, and asserts what it is given.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.transformer.enums import AttnBackend
from support.attention_checks import (
    HEADS,
    PACKS,
    config,
    errors,
    exact,
    exact_packed,
    random_inputs,
    values_and_gradients,
)
from support.run_settings import small_run
from support.transformer_engine import TEDotProductAttention, core_attention

from poweropd_megatron.config.schema import DType, ParallelConfig
from poweropd_megatron.models import attention_settings, build
from poweropd_megatron.models.attention_settings import describe_attention
from poweropd_megatron.models.build import _block_spec, build_chunks, transformer_config
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.kv_cache import KVCache
from poweropd_megatron.models.layers import SDPACoreAttention
from poweropd_megatron.models.packed import pack_params
from poweropd_megatron.models.transformer_engine import TECoreAttention, why_not_transformer_engine
from poweropd_megatron.parallel.layout import Layout

AUTO = AttnBackend.auto


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the layouts of the calls of the stand-in, which is Transformer Engine's attention."""
    monkeypatch.setattr(megatron_te, "TEDotProductAttention", TEDotProductAttention)
    TEDotProductAttention.calls.clear()
    yield TEDotProductAttention.calls
    TEDotProductAttention.calls.clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Transformer Engine be there, and a GPU."""
    monkeypatch.setattr(megatron_te, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_the_stand_in_has_the_arguments_of_megatrons_class() -> None:
    [theirs] = [
        node
        for node in ast.parse(Path(megatron_te.__file__).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention"
    ]
    for method in theirs.body:
        if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "forward"):
            ours = inspect.signature(getattr(TEDotProductAttention, method.name))
            assert list(ours.parameters) == [argument.arg for argument in method.args.args]


@pytest.mark.parametrize("heads", HEADS)
def test_rows_are_attended_to_by_transformer_engine(
    heads: str, layout: Layout, engine: list[str]
) -> None:
    inputs = random_inputs((33, 3), HEADS[heads], torch.float32)
    found = values_and_gradients(core_attention(config(HEADS[heads]), layout.groups), inputs)
    assert engine == ["sbhd"]
    assert max(errors(found, exact(inputs))) <= 1e-6


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
def test_packs_are_attended_to_by_transformer_engine(
    pack: str, heads: str, layout: Layout, engine: list[str]
) -> None:
    lengths = PACKS[pack]
    inputs = random_inputs((sum(lengths),), HEADS[heads], torch.float32)
    attention, packed = core_attention(config(HEADS[heads]), layout.groups), pack_params(lengths)
    found = values_and_gradients(lambda *x: attention(*x, packed_seq_params=packed), inputs)
    assert engine == ["thd"]
    assert max(errors(found, exact_packed(inputs, lengths))) <= 1e-6
    assert packed.cu_seqlens_q_padded is None, "what Megatron's rotary code reads was changed"


@pytest.mark.usefixtures("engine")
def test_the_scale_of_scores_is_handed_over(layout: Layout) -> None:
    inputs = random_inputs((9, 2), (4, 2), torch.float32)
    found = values_and_gradients(
        core_attention(config((4, 2)), layout.groups, softmax_scale=0.3), inputs
    )
    torchs = SDPACoreAttention(config((4, 2)), softmax_scale=0.3)
    assert max(errors(found, values_and_gradients(torchs, inputs))) <= 1e-6


def test_a_rollout_is_attended_to_by_torch(layout: Layout, engine: list[str]) -> None:
    attention = core_attention(config((4, 2)), layout.groups)
    prompts, token = (random_inputs((length, 2), (4, 2), torch.float32) for length in (5, 1))
    found = []
    for module in (attention, SDPACoreAttention(config((4, 2)))):
        cache = KVCache(1, 2, torch.device("cpu"))
        [module.cache] = cache.layers
        cache.admit([0, 1], [5, 3])
        of_prompts = module(*prompts)
        cache.advance()
        found.append((of_prompts, module(*token)))
    assert engine == []
    for ours, torchs in zip(*found, strict=True):
        assert torch.equal(ours, torchs)


@pytest.mark.usefixtures("engine")
def test_checkpoints_hold_nothing_of_transformer_engines(
    layout: Layout, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = read_model_config(student_folder, setting="student.path")

    def stored() -> set[str]:
        [chunk] = build_chunks(model, layout, dtype="fp32")
        return set(chunk.sharded_state_dict())

    with_torchs = stored()
    monkeypatch.setattr(build, "why_not_transformer_engine", lambda *_: None)
    [chunk] = build_chunks(model, layout, dtype="fp32")
    attention = chunk.decoder.layers[0].self_attention.core_attention
    assert isinstance(attention, TECoreAttention)
    assert list(attention.state_dict()) == ["engine._extra_state"]
    assert stored() == with_torchs


def test_without_transformer_engine_a_model_has_torchs_attention(
    layout: Layout, student_folder: Path
) -> None:
    assert why_not_transformer_engine(AUTO, "bf16") == "Transformer Engine is not installed"
    model = read_model_config(student_folder, setting="student.path")
    [chunk] = build_chunks(model, layout, dtype="fp32")
    assert type(chunk.decoder.layers[0].self_attention.core_attention) is SDPACoreAttention


@pytest.mark.usefixtures("installed")
def test_with_transformer_engine_and_a_gpu_a_bf16_model_has_its_attention() -> None:
    assert why_not_transformer_engine(AUTO, "bf16") is None
    assert why_not_transformer_engine(AttnBackend.fused, "bf16") is None
    assert "for bf16, not fp32" in str(why_not_transformer_engine(AUTO, "fp32"))
    assert "'local'" in str(why_not_transformer_engine(AttnBackend.local, "bf16"))


@pytest.mark.parametrize(
    ("backend", "dtype", "attention"),
    [
        (AUTO, "bf16", TECoreAttention),
        (AttnBackend.local, "bf16", SDPACoreAttention),
        (AUTO, "fp32", SDPACoreAttention),
    ],
)
def test_a_layer_is_built_with_what_its_type_and_backend_ask_for(
    backend: AttnBackend,
    dtype: DType,
    attention: type,
    student_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = read_model_config(student_folder, setting="student.path")
    given = {"attention_backend": backend.name}
    of_megatron = transformer_config(model, ParallelConfig(), dtype, given)
    monkeypatch.setattr(megatron_te, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    [layer, *_] = _block_spec(of_megatron, 4).layer_specs
    assert layer.submodules.self_attention.submodules.core_attention is attention


def test_transformer_engine_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_te, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in str(why_not_transformer_engine(AUTO, "bf16"))


def test_the_log_says_whose_attention_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(Path("student"))
    assert describe_attention(run) == (
        "attention: torch's, for Transformer Engine is not installed"
    )
    monkeypatch.setattr(megatron_te, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_settings, "get_te_version", lambda: "2.20")
    run.teacher.dtype = "bf16"
    assert describe_attention(run) == (
        "attention: the student has torch's, for Transformer Engine has its fast kernels for bf16, "
        "not fp32; the teacher Transformer Engine 2.20's; torch's in rollouts"
    )
    run.student.dtype = "bf16"
    for part in (run.student, run.teacher):
        part.megatron = {"attention_backend": "fused"}
    assert describe_attention(run) == (
        "attention: Transformer Engine 2.20's, fused kernels; torch's in rollouts"
    )
