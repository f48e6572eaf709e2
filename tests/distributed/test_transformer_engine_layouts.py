"""With Transformer Engine's attention every layout trains as it does with torch's.

Transformer Engine needs CUDA; a stand-in in plain torch takes what its documentation says.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from comparison import error, largest_error
from layout_rows import ONE_PROCESS, parallel, row
from plain_training import update_in_plain_torch
from support import transformer_engine
from support.attention_checks import config, random_inputs
from support.rank_pool import RankPool
from support.transformer_engine import TEDotProductAttention, core_attention
from training import OPTIMIZER, Measured, Row, build_models, update_on_ranks

from poweropd_megatron.config.schema import TeacherConfig
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.layers import SDPACoreAttention
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.train.teacher import Teacher

TOLERANCE = 1e-5
ROWS = [
    ONE_PROCESS,
    row("TP4", 4, parallel(4)),
    row("TP2xDP2-with-an-empty-micro-batch", 4, parallel(2)),
    row("TP2+SP-packed", 2, parallel(2, sequence=True), max_tokens_per_microbatch=20),
    row("PP2xVPP2", 2, parallel(1, 2, virtual=2), parallel(1, 2)),
    row("CP2", 2, parallel(context=2)),
    row("CP4-packed", 4, parallel(context=4), max_tokens_per_microbatch=40),
    row("CP2xTP2+SP", 4, parallel(2, context=2, sequence=True)),
    row("student-DP2-teacher-CP2", 2, parallel(), parallel(context=2)),
    row(
        "CP2-packed-recompute-attention",
        2,
        parallel(context=2),
        max_tokens_per_microbatch=20,
        recompute_granularity="selective",
        recompute_modules=["core_attn"],
    ),
]


def update_with_stand_in(layout: Row, student: str, teacher: str) -> tuple[Measured, list[str]]:
    """Return what a rank saw of the updates, and the layout of each call of the stand-in."""
    transformer_engine.install()
    return update_on_ranks(layout, student, teacher), TEDotProductAttention.calls


@pytest.fixture(scope="module")
def reference(folders: dict[str, str]) -> Measured:
    return update_in_plain_torch(folders["student-untied"], folders["teacher-untied"])


@pytest.mark.parametrize("layout", ROWS, ids=lambda layout: layout.name)
def test_layout_trains_like_plain_torch_with_transformer_engine(
    layout: Row, folders: dict[str, str], reference: Measured, ranks: RankPool
) -> None:
    folder = folders["student-untied"], folders["teacher-untied"]
    is_packed = layout.max_tokens_per_microbatch is not None
    for measured, calls in ranks.run(
        update_with_stand_in, layout, *folder, world_size=layout.world_size
    ):
        for quantity in ("teacher_logp_BT", "logp_UBT", "entropy_UBT", "loss_U", "grad_norm_U"):
            assert error(getattr(measured, quantity), getattr(reference, quantity)) <= TOLERANCE
        assert set(calls) == {"thd" if is_packed else "sbhd"}
    for quantity in ("gradients", "weights"):
        worst, name = largest_error(getattr(measured, quantity), getattr(reference, quantity))
        assert worst <= TOLERANCE, name


def attend_to_whole_rows() -> tuple[bool, list[str]]:
    """Return whether a rank of two attends to rows of its own, whole, as torch's attention does."""
    transformer_engine.install()
    cpu_device.install()
    model = config((4, 2))
    model.context_parallel_size = 2
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    attention = core_attention(model, SimpleNamespace(cp=dist.group.WORLD, tp=alone))
    attention.is_sliced = False
    rows = random_inputs((6, 2 + dist.get_rank()), (4, 2), torch.float32)
    same = torch.equal(attention(*rows), SDPACoreAttention(config((4, 2)))(*rows))
    return same, TEDotProductAttention.calls


def test_whole_sequences_of_a_rank_are_not_taken_for_slices(ranks: RankPool) -> None:
    assert ranks.run(attend_to_whole_rows, world_size=2) == [(True, [])] * 2


def exchanges_of(exchange: str | None, student: str, teacher: str) -> list[set[str | None]]:
    """Return the cp_comm_type of every layer of the student's, and of the teacher's."""
    transformer_engine.install()
    given = {} if exchange is None else {"cp_comm_type": exchange}
    models = build_models(
        row("CP2", 2, parallel(context=2), **given), student, teacher, "fp32", OPTIMIZER
    )
    frozen = Teacher(
        TeacherConfig(path=teacher, dtype="fp32", parallel=parallel(context=2), megatron=given),
        read_model_config(teacher, setting="teacher.path"),
        models.student.layout,
        logits_dtype="fp32",
    )
    return [
        {
            layer.self_attention.core_attention.engine.cp_comm_type
            for chunk in model.chunks
            for layer in chunk.decoder.layers
        }
        for model in (models.student, frozen)
    ]


@pytest.mark.parametrize("exchange", [None, "a2a"])
def test_each_layer_is_told_how_to_exchange_slices(
    exchange: str | None, folders: dict[str, str], ranks: RankPool
) -> None:
    folder = folders["student-untied"], folders["teacher-untied"]
    found = ranks.run(exchanges_of, exchange, *folder, world_size=2)
    assert found == [[{exchange}, {exchange}]] * 2
