"""Megatron's settings do what they say, and the teacher scores alike in stages of any kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import error
from layout_rows import ONE_PROCESS, parallel, row
from support.rank_pool import RankPool
from torch import Tensor
from training import OPTIMIZER, Row, build_models, fixed_trajectories

from poweropd_megatron.config.pipeline import FIRST
from poweropd_megatron.config.schema import ParallelConfig, TeacherConfig
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.layers import SDPACoreAttention
from poweropd_megatron.objectives.labels import label
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import student_layout
from poweropd_megatron.train.teacher import Teacher


def count_attentions(layout: Row, student: str, teacher: str) -> int:
    """Return how many times an update calls a core attention, for each layer and micro-batch."""
    models = build_models(layout, student, teacher, "fp32", OPTIMIZER)
    teacher_logp_BT = models.teacher.score(models.trajectories, models.labels)
    calls = []
    forward = SDPACoreAttention.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(self)
        return forward(self, *args, **kwargs)

    SDPACoreAttention.forward = counted
    models.update(teacher_logp_BT)
    num_layers, num_micro_batches = 4, 3
    assert len(set(calls)) == num_layers
    return len(calls) // (num_layers * num_micro_batches)


@pytest.mark.parametrize(
    ("megatron", "times"),
    [
        ({}, 1),
        ({"recompute_granularity": "selective"}, 2),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, 1),
        (
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            2,
        ),
    ],
)
def test_recomputation_runs_the_attention_again(
    megatron: dict[str, Any], times: int, folders: dict[str, str], ranks: RankPool
) -> None:
    layout = row("recompute", 1, parallel(), **megatron)
    folder = folders["student-untied"], folders["teacher-untied"]
    assert ranks.run(count_attentions, layout, *folder, world_size=1) == [times]


def count_experts(layout: Row, student: str, teacher: str) -> int:
    """Return how many times an update calls a layer's experts, for each layer and micro-batch."""
    models = build_models(layout, student, teacher, "fp32", OPTIMIZER)
    teacher_logp_BT = models.teacher.score(models.trajectories, models.labels)
    calls = []
    layers = models.student.chunks[0].decoder.layers
    for layer in layers:
        layer.mlp.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    models.update(teacher_logp_BT)
    return len(calls) // (len(layers) * 3)


@pytest.mark.parametrize(("modules", "times"), [(["core_attn"], 1), (["moe"], 2)])
def test_recomputation_runs_the_experts_again(
    modules: list[str], times: int, folders: dict[str, str], ranks: RankPool
) -> None:
    layout = row(
        "recompute", 1, parallel(), recompute_granularity="selective", recompute_modules=modules
    )
    folder = folders["student-experts"], folders["teacher-experts"]
    assert ranks.run(count_experts, layout, *folder, world_size=1) == [times]


def find_what_is_on_its_way(layout: Row, student: str, teacher: str) -> tuple[int, int, int]:
    """Return how many buckets there are; how many of their gradients are on their way when the
    backward of the second update ends; and how many of their weights when that update ends.
    """
    models = build_models(layout, student, teacher, "fp32", OPTIMIZER)
    teacher_logp_BT = models.teacher.score(models.trajectories, models.labels)
    [ddp] = models.student._ddps
    schedule = models.student.chunks[0].config
    finalize: Callable[..., None] = schedule.finalize_model_grads_func
    gradients = []

    def count_and_finalize(*args: Any, **kwargs: Any) -> None:
        gradients.append(sum(group.grad_reduce_handle is not None for group in ddp.bucket_groups))
        finalize(*args, **kwargs)

    schedule.finalize_model_grads_func = count_and_finalize
    for _ in range(2):
        models.update(teacher_logp_BT)
    weights = sum(group.param_gather_handle is not None for group in ddp.bucket_groups)
    models.student.finish_param_gather()
    assert all(group.param_gather_handle is None for group in ddp.bucket_groups)
    return len(ddp.bucket_groups), gradients[1], weights


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
@pytest.mark.parametrize("with_weights", [False, True])
def test_overlapped_gradients_and_weights_are_on_their_way_while_the_run_goes_on(
    with_weights: bool, embeddings: str, folders: dict[str, str], ranks: RankPool
) -> None:
    overlaps = {"overlap_grad_reduce": True, "overlap_param_gather": with_weights}
    layout = row("overlap", 2, parallel(), bucket_size=20000, **overlaps)
    folder = folders[f"student-{embeddings}"], folders[f"teacher-{embeddings}"]
    for found in ranks.run(find_what_is_on_its_way, layout, *folder, world_size=2):
        num_buckets, gradients, weights = found
        assert num_buckets > 1
        assert gradients == num_buckets
        assert weights == (num_buckets if with_weights else 0)


def score(
    parallel_config: ParallelConfig, megatron: dict[str, Any], folder: str, stop: int
) -> Tensor:
    """Return a teacher's scores of the fixed trajectories."""
    cpu_device.install()
    trajectories = fixed_trajectories()
    teacher = Teacher(
        TeacherConfig(
            path=folder,
            dtype="fp32",
            parallel=parallel_config,
            megatron=megatron,
            micro_batch_size=2,
        ),
        read_model_config(folder, setting="teacher.path"),
        student_layout(parallel_config, torch.device("cpu"), seed=1),
        logits_dtype="fp32",
    )
    return teacher.score(trajectories, label(trajectories, "raw", teacher_eos_id=stop))


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
@pytest.mark.parametrize(
    ("layout", "megatron"),
    [
        (parallel(1, 2, virtual=2), {}),
        (parallel(1, 2), {FIRST: 3}),
        (parallel(1, 3), {FIRST: 2}),
        (parallel(2, 2, virtual=2, sequence=True), {}),
    ],
    ids=["PP2xVPP2", "PP2-3-and-1-layers", "PP3-2-1-1-layers", "TP2xPP2xVPP2+SP"],
)
def test_a_teacher_scores_alike_in_virtual_and_uneven_stages(
    layout: ParallelConfig,
    megatron: dict[str, Any],
    embeddings: str,
    folders: dict[str, str],
    ranks: RankPool,
) -> None:
    folder = folders[f"student-{embeddings}"]
    [expected_BT] = ranks.run(score, ONE_PROCESS.teacher, {}, folder, 36, world_size=1)
    by_rank = ranks.run(score, layout, megatron, folder, 36, world_size=layout.model_parallel_size)
    for logp_BT in by_rank:
        assert error(logp_BT, expected_BT) <= 1e-5
