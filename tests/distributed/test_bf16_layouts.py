"""bf16 over two ranks: as near to fp64 as in one process, with fp32 main weights that move."""

from dataclasses import dataclass, replace

import pytest
import torch
from plain_training import update_in_plain_torch
from support.rank_pool import RankPool
from torch import Tensor
from training import (
    OPTIMIZER,
    Measured,
    Row,
    build_models,
    update_on_ranks,
)

from poweropd_megatron.config.schema import ParallelConfig

NUM_TINY_UPDATES = 5
TINY_LR = 1e-6
"""Below half of bf16's spacing for every weight above 1e-3."""
LAYOUTS = {
    "one-process": (1, ParallelConfig()),
    "TP2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "TP2+SP": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
}


def row(name: str) -> Row:
    world_size, parallel = LAYOUTS[name]
    return Row(name=name, world_size=world_size, student=parallel, teacher=parallel)


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The bf16 weights and their fp32 main copies before and after tiny updates."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    main_before: dict[str, Tensor]
    main_halfway: dict[str, Tensor]
    main_after: dict[str, Tensor]


def move_on_ranks(row: Row, student_folder: str, teacher_folder: str) -> Moved:
    """Return how weights move under updates that are far below bf16's spacing."""
    optimizer = replace(
        OPTIMIZER,
        lr=TINY_LR,
        min_lr=TINY_LR,
        lr_decay_style="constant",
        weight_decay=0.0,
        adam_eps=1e-12,
    )
    models = build_models(row, student_folder, teacher_folder, "bf16", optimizer)
    teacher_logp_BT = models.teacher.score(models.trajectories, models.labels)

    def weights() -> dict[str, Tensor]:
        return {name: copies[0] for name, copies in models.gather(lambda w: w).items()}

    def main_weights() -> dict[str, Tensor]:
        gathered = models.gather(lambda w: w.main_param.view_as(w))
        return {name: copies[0] for name, copies in gathered.items()}

    before, main_before = weights(), main_weights()
    models.update(teacher_logp_BT)
    main_halfway = main_weights()
    for _ in range(NUM_TINY_UPDATES - 1):
        models.update(teacher_logp_BT)
    return Moved(
        before=before,
        after=weights(),
        main_before=main_before,
        main_halfway=main_halfway,
        main_after=main_weights(),
    )


def error(actual: dict[str, list[Tensor]], reference: dict[str, list[Tensor]]) -> float:
    """Return the norm of the difference over all tensors, over the norm of the reference."""
    difference, norm = (
        torch.stack(norms).norm()
        for norms in zip(
            *(
                ((actual[name][0].double() - tensors[0]).norm(), tensors[0].norm())
                for name, tensors in reference.items()
            ),
            strict=True,
        )
    )
    return float(difference / norm)


@pytest.fixture(scope="module")
def plain(folders: dict[str, str]) -> Measured:
    return update_in_plain_torch(folders["student-untied"], folders["teacher-untied"])


@pytest.fixture(scope="module")
def one_process(folders: dict[str, str], ranks: RankPool) -> Measured:
    return run("one-process", folders, ranks)


def run(name: str, folders: dict[str, str], ranks: RankPool) -> Measured:
    args = (row(name), folders["student-untied"], folders["teacher-untied"], "bf16")
    measured: Measured = ranks.run(update_on_ranks, *args, world_size=LAYOUTS[name][0])[0]
    return measured


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one-process"])
def test_bf16_in_a_layout_errs_at_most_twice_as_much_as_in_one_process(
    name: str, folders: dict[str, str], ranks: RankPool, plain: Measured, one_process: Measured
) -> None:
    measured = run(name, folders, ranks)
    for quantity in ("teacher_logp_BT", "logp_UBT", "entropy_UBT", "grad_norm_U"):
        errors = [
            float((getattr(m, quantity).double() - getattr(plain, quantity)).norm())
            for m in (measured, one_process)
        ]
        assert errors[0] <= 2 * errors[1], quantity
    for quantity in ("gradients", "weights"):
        wanted = getattr(plain, quantity)
        errors = [error(getattr(m, quantity), wanted) for m in (measured, one_process)]
        assert errors[0] <= 2 * errors[1] <= 0.2, quantity
    assert all(tensors[0].dtype == torch.float32 for tensors in measured.gradients.values())
    assert all(tensors[0].dtype == torch.bfloat16 for tensors in measured.weights.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_main_weights_move_where_bf16_would_round_the_update_away(
    name: str, folders: dict[str, str], ranks: RankPool
) -> None:
    args = (row(name), folders["student-untied"], folders["teacher-untied"])
    moved: Moved = ranks.run(move_on_ranks, *args, world_size=LAYOUTS[name][0])[0]
    unchanged = sum(int((moved.after[n] == w).sum()) for n, w in moved.before.items())
    assert unchanged >= 0.99 * sum(weight.numel() for weight in moved.before.values())
    for tensor_name, before in moved.main_before.items():
        if tensor_name == "padding" or tensor_name == "model.embed_tokens.weight":
            continue
        assert before.dtype == torch.float32
        assert torch.equal(before, moved.before[tensor_name].float())
        first = (moved.main_halfway[tensor_name] - before).abs()
        assert (first > 0).float().mean() > 0.99
        total = (moved.main_after[tensor_name] - before).abs()
        assert total.max() <= 1.5 * NUM_TINY_UPDATES * TINY_LR
        assert total.mean() > 2 * first.mean()
        assert torch.equal(moved.main_after[tensor_name].bfloat16(), moved.after[tensor_name])
