"""Tied embeddings over pipeline stages: two copies of one weight, which learn from both uses."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from comparison import error
from layout_rows import parallel, row
from plain_training import update_in_plain_torch
from safetensors.torch import load_file
from support import qwen3_folder
from support.rank_pool import RankPool
from torch import Tensor
from training import NUM_UPDATES, OPTIMIZER, Row, build_models, update_on_ranks

from poweropd_megatron.config.pipeline import EMBEDDING, LOSS

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = [
    row("PP2", 2, parallel(1, 2), parallel()),
    row("PP2xVPP2", 2, parallel(1, 2, virtual=2), parallel()),
    row("PP3-counted", 3, parallel(1, 3), parallel(), **{EMBEDDING: True, LOSS: True}),
    row("TP2xPP2xVPP2", 4, parallel(2, 2, virtual=2), parallel()),
]


def copies_after_each_update(
    layout: Row, student_folder: str, teacher_folder: str
) -> list[list[Tensor]]:
    """Return the copies of the embeddings, after loading and after each update."""
    models = build_models(layout, student_folder, teacher_folder, "fp32", OPTIMIZER)
    teacher_logp_BT = models.teacher.score(models.trajectories, models.labels)
    copies = [models.gather(lambda weight: weight)[EMBEDDINGS]]
    for _ in range(NUM_UPDATES):
        models.update(teacher_logp_BT)
        copies.append(models.gather(lambda weight: weight)[EMBEDDINGS])
    return copies


@pytest.mark.parametrize("layout", ROWS, ids=lambda layout: layout.name)
def test_both_copies_are_the_folders_after_loading_and_equal_after_each_update(
    layout: Row, folders: dict[str, str], ranks: RankPool
) -> None:
    student, teacher = folders["student-tied"], folders["teacher-tied"]
    over_time = ranks.run(
        copies_after_each_update, layout, student, teacher, world_size=layout.world_size
    )[0]
    loaded = load_file(Path(student, "model.safetensors"))[EMBEDDINGS]
    assert torch.equal(over_time[0][0], loaded)
    for copies in over_time:
        assert len(copies) == 2 * layout.student.tensor_model_parallel_size, "of both stages"
        assert all(torch.equal(copy, copies[0]) for copy in copies)
    for before, after in pairwise(over_time):
        assert not torch.equal(before[0], after[0])


@pytest.fixture(scope="module")
def gradients_of_both_uses(
    folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tensor, Tensor]:
    """Return what plain torch gets where embeddings and head are two weights of one value."""
    tensors = load_file(Path(folders["student-tied"], "model.safetensors"))
    apart = tmp_path_factory.mktemp("apart")
    qwen3_folder.write(apart, num_hidden_layers=4, vocab_size=37, tie_word_embeddings=False)
    qwen3_folder.write_tensors(apart, tensors | {HEAD: tensors[EMBEDDINGS].clone()})
    gradients = update_in_plain_torch(str(apart), folders["teacher-tied"]).gradients
    return gradients[EMBEDDINGS][0], gradients[HEAD][0]


@pytest.mark.parametrize("layout", ROWS, ids=lambda layout: layout.name)
def test_the_gradient_is_the_sum_of_both_uses(
    layout: Row,
    gradients_of_both_uses: tuple[Tensor, Tensor],
    folders: dict[str, str],
    ranks: RankPool,
) -> None:
    of_embeddings, of_head = gradients_of_both_uses
    measured = ranks.run(
        update_on_ranks,
        layout,
        folders["student-tied"],
        folders["teacher-tied"],
        world_size=layout.world_size,
    )[0]
    for gradient in measured.gradients[EMBEDDINGS]:
        assert error(gradient, of_embeddings + of_head) <= 1e-5
        assert error(gradient, of_head) > 0.1
        assert error(gradient, of_embeddings) > 0.1
