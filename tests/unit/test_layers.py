"""The Megatron model against transformers and against the model written out in fp64."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import qwen3_folder
from support.plain_qwen3 import PlainQwen3

from poweropd_megatron.models.build import build_model, padded_vocab_size
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.parallel.layout import Layout

SCRIPT = Path(__file__).parents[1] / "support" / "transformers_logits.py"
TOLERANCE = 2e-5
"""Of the logits' standard deviation: the noise of fp32 through a few layers."""
CASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "one key head": {"num_key_value_heads": 1, "head_dim": 24, "rope_theta": 1e6},
    "as many key heads": {"num_key_value_heads": 4, "num_hidden_layers": 3, "rms_norm_eps": 0.1},
    "new spelling": {"spelling": "transformers-5", "vocab_size": 61, "rope_theta": 30.0},
    "new spelling, tied": {"spelling": "transformers-5", "tie_word_embeddings": True},
    "experts": qwen3_folder.MOE,
    "experts, new spelling": qwen3_folder.MOE | {"spelling": "transformers-5", "num_experts": 6},
    "experts whose weights don't sum to 1": qwen3_folder.MOE | {"norm_topk_prob": False},
    "one expert a token": qwen3_folder.MOE | {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "all experts for each token": qwen3_folder.MOE | {"num_experts_per_tok": 4},
    "llama": qwen3_folder.LLAMA,
    "llama, tied, heads share out the hidden size": qwen3_folder.LLAMA
    | {"tie_word_embeddings": True, "head_dim": None, "num_key_value_heads": 1},
    "llama, new spelling": qwen3_folder.LLAMA | {"spelling": "transformers-5", "head_dim": 20},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder per case, with ids and the logits that transformers gives for them."""
    root = tmp_path_factory.mktemp("qwen3")
    made = {}
    for number, (case, changes) in enumerate(CASES.items()):
        folder = made[case] = root / str(number)
        qwen3_folder.write(folder, seed=number, **changes)
        vocab_size = changes.get("vocab_size", qwen3_folder.SMALL["vocab_size"])
        ids = torch.randint(vocab_size, (2, 33), generator=torch.Generator().manual_seed(number))
        torch.save(ids, folder / "ids.pt")
    command = [sys.executable, str(SCRIPT), *map(str, made.values())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    return made


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_and_of_fp64(
    case: str, folders: dict[str, Path], layout: Layout
) -> None:
    folder = folders[case]
    ids = torch.load(folder / "ids.pt")
    theirs = torch.load(folder / "logits.pt")
    model = read_model_config(folder, setting="student.path")
    [chunk] = build_model(model, layout, folder=str(folder), dtype="fp32", setting="student.path")
    with torch.no_grad():
        ours = chunk.eval()(input_ids=ids, position_ids=None, attention_mask=None)
        exact = PlainQwen3.from_folder(folder).logits(ids)
    scale = exact.std().item()
    assert scale > 0.5
    # Where queries and keys aren't normed, scores are larger, and their rounding with them.
    allowed = TOLERANCE * scale * (1 if model.qk_layernorm else 4)
    assert (ours - theirs).abs().max().item() <= allowed
    assert (ours - exact).abs().max().item() <= allowed
    assert (theirs - exact).abs().max().item() <= allowed


def test_bf16_logits_err_no_more_than_bf16_rounding_through_the_layers(
    folders: dict[str, Path], layout: Layout
) -> None:
    folder = folders["tied"]
    ids = torch.load(folder / "ids.pt")
    model = read_model_config(folder, setting="student.path")
    [chunk] = build_model(model, layout, folder=str(folder), dtype="bf16", setting="student.path")
    assert {parameter.dtype for parameter in chunk.parameters()} == {torch.bfloat16}
    rounded = PlainQwen3.from_folder(folder)
    rounded.weights = {name: x.detach().bfloat16().double() for name, x in rounded.weights.items()}
    with torch.no_grad():
        ours = chunk.eval()(input_ids=ids, position_ids=None, attention_mask=None)
        exact = rounded.logits(ids)
    root_mean_square = (ours.double() - exact).square().mean().sqrt()
    assert root_mean_square < 4 * 2**-8 * exact.std()


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "padded"),
    [(53, 1, 53), (53, 2, 54), (53, 4, 56), (56, 4, 56), (151936, 8, 151936), (5, 8, 8)],
)
def test_the_vocabulary_is_padded_to_the_next_multiple_of_tp(
    vocab_size: int, tp_size: int, padded: int
) -> None:
    assert padded_vocab_size(vocab_size, tp_size) == padded
