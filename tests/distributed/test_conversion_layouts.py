"""Hugging Face -> converted -> Megatron in a layout -> saved -> Hugging Face: bitwise, in each.

On the way the model's logits are those of `transformers`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layout_rows import parallel
from safetensors.torch import load_file
from stored_models import Cell, load_run_save, load_run_save_stock
from support import qwen3_folder
from support.qwen3_folder import LLAMA, MOE
from support.rank_pool import RankPool
from torch import Tensor

from poweropd_megatron.conversion.to_hugging_face import to_hugging_face
from poweropd_megatron.conversion.to_megatron import to_megatron

SHAPE = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 53,
}
"""With 16 channels a head, these aren't hidden / heads; no TP but one divides the vocabulary."""
KINDS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "experts": MOE,
    "llama": LLAMA | {"tie_word_embeddings": True},
}
TOLERANCE = 1e-5
"""Largest difference of logits, over their standard deviation; seen: 6e-6."""
TOLERANCE_OF_LLAMA = 4e-5
"""Queries and keys aren't normed: scores are larger, and their rounding with them."""

DENSE = [
    Cell(name="TP1", world_size=1, parallel=parallel()),
    Cell(name="TP2", world_size=2, parallel=parallel(2)),
    Cell(name="TP8-of-4-KV-heads", world_size=8, parallel=parallel(8)),
    Cell(name="PP2", world_size=2, parallel=parallel(1, 2)),
    Cell(
        name="PP2-of-3-and-1-layers",
        world_size=2,
        parallel=parallel(1, 2),
        megatron={"num_layers_in_last_pipeline_stage": 1},
    ),
    Cell(name="PP2xVPP2", world_size=2, parallel=parallel(1, 2, virtual=2)),
    Cell(name="TP2xPP2", world_size=4, parallel=parallel(2, 2)),
]
EXPERTS = [
    Cell(name="TP1", world_size=1, parallel=parallel()),
    Cell(name="EP2", world_size=2, parallel=parallel(expert=2)),
    Cell(name="TP2xEP2", world_size=2, parallel=parallel(2, expert=2, sequence=True)),
    Cell(name="EP2xPP2", world_size=4, parallel=parallel(1, 2, expert=2)),
]
TIED = [cell for cell in DENSE if cell.name in ("TP2", "PP2", "PP2xVPP2", "TP2xPP2")]
CASES = [
    (kind, cell)
    for kind, cells in (
        ("untied", DENSE),
        ("tied", TIED),
        ("experts", EXPERTS),
        ("llama", [*DENSE[:2], *TIED[1:]]),
    )
    for cell in cells
]
STOCK = [
    ("untied", Cell(name="TP2", world_size=2, parallel=parallel(2)), 1),
    ("tied", Cell(name="TP8-of-4-KV-heads", world_size=8, parallel=parallel(8)), 1),
    ("experts", Cell(name="EP2", world_size=2, parallel=parallel(expert=2)), 1),
    ("experts", Cell(name="TP2xETP2", world_size=2, parallel=parallel(2)), 2),
    ("experts", Cell(name="EP2xETP2", world_size=4, parallel=parallel(2, expert=2)), 2),
]
SCRIPT = Path(__file__).parents[1] / "support" / "transformers_logits.py"
IDS = torch.randint(53, (2, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the Hugging Face folder of each kind; its conversion lies beside it."""
    root = tmp_path_factory.mktemp("models")
    for seed, (kind, changes) in enumerate(KINDS.items()):
        qwen3_folder.write(root / kind, seed=seed, **(SHAPE | changes))
        to_megatron(root / kind, root / f"{kind}-converted")
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, Tensor]:
    """Return the logits of transformers, from a process of its own."""
    for folder in models.values():
        torch.save(IDS, folder / "ids.pt")
    folders = map(str, models.values())
    subprocess.run([sys.executable, str(SCRIPT), *folders], check=True, capture_output=True)
    return {kind: torch.load(folder / "logits.pt") for kind, folder in models.items()}


def check(
    kind: str,
    logits: list[Tensor],
    target: Path,
    models: dict[str, Path],
    expected: dict[str, Tensor],
) -> None:
    """Return if logits and the saved weights are those of the model that was converted."""
    assert logits
    for found in logits:
        assert found.shape == expected[kind].shape
        tolerance = TOLERANCE_OF_LLAMA if kind == "llama" else TOLERANCE
        assert (found - expected[kind]).abs().max() <= tolerance * expected[kind].std()
    exported = target / "exported"
    to_hugging_face(target / "saved" / "step_000001", exported, reference=models[kind])
    first = load_file(models[kind] / "model.safetensors")
    tensors = load_file(exported / "model.safetensors")
    assert tensors.keys() == first.keys()
    for name, tensor in first.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize(("kind", "cell"), CASES, ids=lambda value: getattr(value, "name", value))
def test_weights_come_back_bitwise_through_a_layout_and_give_the_logits_of_transformers(
    kind: str,
    cell: Cell,
    models: dict[str, Path],
    expected: dict[str, Tensor],
    ranks: RankPool,
    tmp_path: Path,
) -> None:
    stored = models[kind].with_name(f"{kind}-converted") / "weights"
    by_rank = ranks.run(
        load_run_save,
        cell,
        str(models[kind]),
        str(stored),
        str(tmp_path / "saved"),
        IDS,
        world_size=cell.world_size,
    )
    logits = [found for found in by_rank if found is not None]
    assert len(logits) == cell.world_size // cell.parallel.pipeline_model_parallel_size
    check(kind, logits, tmp_path, models, expected)


@pytest.mark.parametrize(
    ("kind", "cell", "expert_tensor"), STOCK, ids=lambda value: getattr(value, "name", str(value))
)
def test_they_do_through_megatrons_own_layers_with_experts_cut_too(
    kind: str,
    cell: Cell,
    expert_tensor: int,
    models: dict[str, Path],
    expected: dict[str, Tensor],
    ranks: RankPool,
    tmp_path: Path,
) -> None:
    stored = models[kind].with_name(f"{kind}-converted") / "weights"
    logits = ranks.run(
        load_run_save_stock,
        cell,
        expert_tensor,
        str(models[kind]),
        str(stored),
        str(tmp_path / "saved"),
        IDS,
        world_size=cell.world_size,
    )
    check(kind, logits, tmp_path, models, expected)
