"""The layers of a Qwen3-MoE: their keys in checkpoints, and what their router adds to the loss."""

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from support import qwen3_folder
from support.plain_qwen3 import PlainQwen3

from poweropd_megatron.models.build import build_model
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.parallel.layout import Layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    qwen3_folder.write(folder, seed=2, **qwen3_folder.MOE)
    return folder


def test_checkpoints_have_the_keys_of_transformer_engines_layers(
    folder: Path, layout: Layout
) -> None:
    """One format, whichever layers wrote it; experts are numbers along a dimension."""
    model = read_model_config(folder, setting="student.path")
    [chunk] = build_model(model, layout, folder=str(folder), dtype="fp32", setting="student.path")
    state = chunk.sharded_state_dict()
    keys = {
        tensor.key: tensor
        for name, tensor in state.items()
        if not name.endswith("_extra_state") and "decoder.layers" in name
    }
    prefix = "decoder.layers."
    assert keys.keys() == {
        prefix + "self_attention.linear_qkv.layer_norm_weight",
        prefix + "self_attention.linear_qkv.weight",
        prefix + "self_attention.linear_proj.weight",
        prefix + "self_attention.q_layernorm.weight",
        prefix + "self_attention.k_layernorm.weight",
        prefix + "pre_mlp_layernorm.weight",
        prefix + "mlp.router.weight",
        prefix + "mlp.experts.experts.linear_fc1.weight",
        prefix + "mlp.experts.experts.linear_fc2.weight",
    }
    assert keys[prefix + "mlp.experts.experts.linear_fc2.weight"].global_shape == (2, 4, 48, 24)


def test_the_router_learns_from_the_loss_alone(folder: Path, layout: Layout) -> None:
    """No balancing loss: in training mode every gradient is that of plain torch."""
    model = read_model_config(folder, setting="student.path")
    [chunk] = build_model(model, layout, folder=str(folder), dtype="fp32", setting="student.path")
    ids = torch.randint(53, (2, 9), generator=torch.Generator().manual_seed(5))
    plain = PlainQwen3.from_folder(folder)
    plain.logits(ids).square().sum().backward()
    chunk.train()(input_ids=ids, position_ids=None, attention_mask=None).square().sum().backward()
    for number, layer in enumerate(chunk.decoder.layers):
        expected = plain.weights[f"model.layers.{number}.mlp.gate.weight"].grad
        assert expected is not None
        error = (layer.mlp.router.weight.grad - expected).norm() / expected.norm()
        assert error < 1e-5


def test_experts_in_bf16_err_no_more_than_bf16_rounding_where_no_token_changes_its_experts(
    folder: Path, layout: Layout
) -> None:
    """All experts take each token here, so rounding can't send one elsewhere.

    The bound is half again that of a dense model: the weights of the experts are rounded too.
    """
    everywhere = folder.parent / "everywhere"
    changes = qwen3_folder.MOE | {"num_experts_per_tok": 4}
    qwen3_folder.write(everywhere, seed=2, **changes)
    model = read_model_config(everywhere, setting="student.path")
    [chunk] = build_model(
        model, layout, folder=str(everywhere), dtype="bf16", setting="student.path"
    )
    ids = torch.randint(53, (2, 33), generator=torch.Generator().manual_seed(5))
    rounded = PlainQwen3.from_folder(everywhere)
    rounded.weights = {name: x.detach().bfloat16().double() for name, x in rounded.weights.items()}
    with torch.no_grad():
        ours = chunk.eval()(input_ids=ids, position_ids=None, attention_mask=None)
        exact = rounded.logits(ids)
    root_mean_square = (ours.double() - exact).square().mean().sqrt()
    assert root_mean_square < 6 * 2**-8 * exact.std()


def test_the_router_of_a_bf16_model_decides_in_fp32(folder: Path, layout: Layout) -> None:
    """Rounded logits would tie or swap experts whose logits differ by less than bf16's spacing."""
    model = read_model_config(folder, setting="student.path")
    [chunk] = build_model(model, layout, folder=str(folder), dtype="bf16", setting="student.path")
    router = chunk.decoder.layers[0].mlp.router
    generator = torch.Generator().manual_seed(1)
    hidden_SBH = torch.randn(5, 2, model.hidden_size, generator=generator).bfloat16()
    logits = router.gating(hidden_SBH)
    expected = hidden_SBH.double() @ router.weight.double().t()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_routers_do_not_multiply_by_transformer_engine(
    folder: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose GEMM is TF32 for fp32, and which Megatron takes wherever it is installed."""

    def gemm_in_tf32(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the router multiplied by Transformer Engine")

    monkeypatch.setattr(moe_utils, "te_general_gemm", gemm_in_tf32)
    model = read_model_config(folder, setting="student.path")
    [chunk] = build_model(model, layout, folder=str(folder), dtype="fp32", setting="student.path")
    ids = torch.arange(6)[None]
    chunk(ids, torch.arange(6)[None], None).sum().backward()
