"""Objectives over the whole vocabulary on a GPU against dense fp64 autograd; skipped without one.

Shapes: N tokens, H hidden, V vocabulary.
"""

import pytest
import torch
import torch.distributed as dist
from support.lm_head_cases import Case, error, leaves
from support.vocabulary_cases import OBJECTIVES, Outcome, dense, teacher_of

from poweropd_megatron.ops import lm_head_tiles
from poweropd_megatron.ops.fused_vocabulary_gradient import fused_vocabulary_gradient
from poweropd_megatron.ops.lm_head_tiles import LMHead

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> dist.ProcessGroup:
    """Yield a group of this process alone."""
    store = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_objectives_have_the_values_and_gradients_of_dense_fp64_autograd(
    kind: str, dtype: torch.dtype, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(vocab_size=1201, padded_size=1208, dtype=dtype, with_ignored=True)
    monkeypatch.setattr(lm_head_tiles, "CHUNK_BYTES", {"cuda": 40 * 4 * 1208})
    batch, teacher = case.batch(), teacher_of(case)
    hidden_NH, weight_VpH = (leaf.detach().cuda().requires_grad_() for leaf in leaves(batch))
    result = fused_vocabulary_gradient(
        hidden_NH,
        LMHead(weight_VpH=weight_VpH, vocab_size=case.vocab_size, tp_group=group),
        teacher.hidden_NG.cuda(),
        LMHead(weight_VpH=teacher.weight_VpG.cuda(), vocab_size=case.vocab_size, tp_group=group),
        batch.targets_N.cuda(),
        OBJECTIVES[kind],
    )
    result.loss.backward()
    found = Outcome(*result[1:], hidden_grad_NH=hidden_NH.grad, weight_grad_VpH=weight_VpH.grad)
    truth = dense(kind, case, batch, teacher)
    # fp32 operands of a GPU's products of one fp32 and one bf16 tensor are rounded to bf16.
    torchs = dense(kind, case, batch, teacher, dtype=dtype, logits_dtype=torch.float32)
    for quantity in truth._fields:
        expected = getattr(truth, quantity)
        allowed = 1e-5 if dtype == torch.float32 else 1e-2
        allowed += 2 * error(getattr(torchs, quantity), expected)
        assert error(getattr(found, quantity).cpu(), expected) <= allowed, quantity
