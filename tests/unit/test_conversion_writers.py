"""Checkpoints of any writer: in any pieces, padded, with a key a layer, with an optimizer."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import qwen3_folder
from support.converted_folder import global_tensors
from support.stored_checkpoint import write_in_pieces
from torch import Tensor

from poweropd_megatron.conversion.shards import parse_size
from poweropd_megatron.conversion.to_hugging_face import to_hugging_face
from poweropd_megatron.errors import InputError
from poweropd_megatron.inspection.folder import examine

LAYERS = "decoder.layers."


@pytest.fixture(scope="module", params=["dense", "experts"])
def model(request, tmp_path_factory):
    """Return a Hugging Face folder and its global tensors."""
    folder = tmp_path_factory.mktemp("hf") / "hf"
    qwen3_folder.write(folder, **(qwen3_folder.MOE if request.param == "experts" else {}))
    return folder, global_tensors(folder)


def assert_export_is(folder: Path, weights: Path, tmp_path: Path) -> None:
    to_hugging_face(weights, tmp_path / "out", reference=folder)
    expected = load_file(folder / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def one_layer(tensor: Tensor) -> list[int]:
    return [1, *tensor.shape[1:]]


CUTS: dict[str, Callable[[Tensor], Sequence[int]]] = {
    "rows": lambda t: [1, *t.shape[1:-2], -(-t.shape[-2] // 3), t.shape[-1]],
    "columns": lambda t: [1, *t.shape[1:-1], -(-t.shape[-1] // 3)],
    "rows and columns": lambda t: [1, *t.shape[1:-2], 7, 11],
    "several layers and experts at once": lambda t: list(t.shape),
    "layers, one expert": lambda t: [t.shape[0], *[1] * (t.dim() - 3), *t.shape[-2:]],
}


@pytest.mark.parametrize("cut", CUTS)
def test_pieces_of_any_size_are_put_together(cut, model, tmp_path):
    folder, stored = model
    sizes = {
        key: CUTS[cut](tensor) if tensor.dim() > 2 else one_layer(tensor)
        for key, tensor in stored.items()
        if key.startswith(LAYERS)
    }
    sizes["embedding.word_embeddings.weight"] = [9, 48]
    sizes["output_layer.weight"] = [20, 17]
    write_in_pieces(tmp_path / "weights", stored, sizes)
    assert_export_is(folder, tmp_path / "weights", tmp_path)


def test_rows_that_pad_the_vocabulary_are_left_out(model, tmp_path):
    folder, stored = model
    padded = dict(stored)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padded[key] = torch.cat([stored[key], torch.full((11, 48), float("nan"))])
    write_in_pieces(tmp_path / "weights", padded, {"output_layer.weight": [60, 48]})
    assert_export_is(folder, tmp_path / "weights", tmp_path)


def test_a_checkpoint_with_a_key_for_each_layer_is_read(model, tmp_path):
    folder, stored = model
    by_layer = {key: tensor for key, tensor in stored.items() if not key.startswith(LAYERS)}
    for key, tensor in stored.items():
        if key.startswith(LAYERS):
            for layer, part in enumerate(tensor):
                by_layer[f"{LAYERS}{layer}.{key.removeprefix(LAYERS)}"] = part
    write_in_pieces(tmp_path / "weights", by_layer, {})
    assert_export_is(folder, tmp_path / "weights", tmp_path)


@pytest.mark.parametrize("prefix", ["optimizer.state.param.", "optimizer.state.fp32_param."])
def test_fp32_is_the_optimizers_and_otherwise_the_models(prefix, model, tmp_path):
    folder, stored = model
    training = {key: tensor.bfloat16() for key, tensor in stored.items()}
    training |= {prefix + key: tensor for key, tensor in stored.items()}
    training |= {f"optimizer.state.exp_avg.{key}": tensor for key, tensor in stored.items()}
    write_in_pieces(tmp_path / "weights", training, {})
    expected = load_file(folder / "model.safetensors")
    for dtype in (torch.float32, None):
        out = tmp_path / str(dtype)
        to_hugging_face(tmp_path / "weights", out, reference=folder, dtype=dtype)
        found = load_file(out / "model.safetensors")
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor if dtype else tensor.bfloat16()), name


@pytest.mark.parametrize("form", ["tensor", "object"])
def test_fp32_copies_in_a_form_that_is_not_known_are_not_passed_over(form, model, tmp_path):
    """Megatron-LM's sharded optimizer formats keep flat buckets, from which nothing is taken:
    tensors, or one object (dp_zero_gather_scatter)."""
    folder, stored = model
    training = {key: tensor.bfloat16() for key, tensor in stored.items()}
    buckets = {"optimizer.distributed.dp_group_idx_0.param_state": torch.zeros(9)}
    if form == "tensor":
        write_in_pieces(tmp_path / "weights", training | buckets, {})
    else:
        write_in_pieces(tmp_path / "weights", training, {}, buckets)
    findings = examine(tmp_path / "weights", reference=folder)
    assert (findings.kind, findings.problems) == ("training", [])
    assert f"1 {form}s" in findings.facts["optimizer"]
    with pytest.raises(InputError, match=r"no fp32 copy of embedding\.word_embeddings\.weight"):
        to_hugging_face(
            tmp_path / "weights", tmp_path / "fp32", reference=folder, dtype=torch.float32
        )
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    to_hugging_face(tmp_path / "weights", tmp_path / "bf16", reference=folder)


@pytest.mark.parametrize(("tracked", "name"), [("release", "release"), ("20", "iter_0000020")])
def test_a_folder_of_megatron_lms_is_found_by_its_tracker(tracked, name, model, tmp_path):
    folder, stored = model
    write_in_pieces(tmp_path / "saved" / name, stored, {})
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text(f"{tracked}\n")
    assert_export_is(folder, tmp_path / "saved", tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe2\x000\x00", b"20\n30\n", b"", b"9" * 300])
def test_a_tracker_that_names_no_iteration_is_told_in_one_line(content, model, tmp_path):
    tracker = tmp_path / "saved" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir()
    tracker.write_bytes(content)
    with pytest.raises(InputError, match=f"^--input: {tracker} (can't be read|says)") as caught:
        to_hugging_face(tmp_path / "saved", tmp_path / "out", reference=model[0])
    assert "\n" not in str(caught.value)


def test_an_output_in_the_folder_that_a_link_leads_to_is_refused(model, tmp_path):
    folder, stored = model
    write_in_pieces(tmp_path / "elsewhere", stored, {})
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "release").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("release")
    before = sorted((tmp_path / "elsewhere").iterdir())
    with pytest.raises(InputError, match=r"--output: .* --input .*elsewhere lie in one another"):
        to_hugging_face(tmp_path / "saved", tmp_path / "elsewhere" / "out", reference=folder)
    assert sorted((tmp_path / "elsewhere").iterdir()) == before


def test_sizes_are_exact_and_of_any_number_of_digits():
    assert parse_size("0.3GB") == 300_000_000
    assert parse_size("2 GiB") == 2**31
    assert parse_size("9" * 400 + "GB") > 10**400
    with pytest.raises(ValueError, match="is no size above 0"):
        parse_size("0." + "0" * 400 + "1GB")
