"""The compiled CUDA kernels on a GPU, over the cases that every back-end is tried on."""

import pytest
import torch
import torch.distributed as dist
from support.reward_checks import check_rewards
from support.row_cases import CASES
from support.row_checks import RowBackend, check_order_of_ranks, check_stats_and_gradient

from poweropd_megatron.ops.backends import compiled
from poweropd_megatron.ops.fused_policy_gradient import fused_policy_gradient
from poweropd_megatron.ops.lm_head import materialized_logprob, recomputed_logprob, score
from poweropd_megatron.ops.lm_head_tiles import LMHead
from poweropd_megatron.ops.rewards import token_reward

FAR_ROWS_BYTES = 24 << 30
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def backend() -> RowBackend:
    """Return the CUDA kernels, which have to be there where a GPU is."""
    kernels = compiled("cuda")
    assert not isinstance(kernels, str), f"the CUDA kernels can't be loaded: {kernels}"
    return kernels


@pytest.mark.parametrize("name", CASES)
def test_stats_log_probs_and_gradients_are_those_of_fp64(name: str, backend: RowBackend) -> None:
    if name.startswith("far-rows") and torch.cuda.mem_get_info()[0] < FAR_ROWS_BYTES:
        pytest.skip("the rows lie 2**31 elements apart: too little GPU memory")
    check_stats_and_gradient(backend, CASES[name], device="cuda", exp_error=2**-22)


def test_ranks_are_merged_in_their_order(backend: RowBackend) -> None:
    check_order_of_ranks(backend, device="cuda")


def test_rewards_are_those_of_fp64(backend: RowBackend) -> None:
    check_rewards(backend, device="cuda")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> dist.ProcessGroup:
    """Yield a group of this process alone."""
    store = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fused", "recompute", "materialized"])
def test_each_lm_head_has_the_gradients_of_fp64(
    kind: str, dtype: torch.dtype, group: dist.ProcessGroup
) -> None:
    """The products go through tensor cores here, with an fp32 result of bf16 operands."""
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3000, 128, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(9001, 128, generator=generator)).to(dtype)
    targets = torch.randint(9000, (3000,), generator=generator)
    teacher = -torch.rand(3000, generator=generator)

    exact_hidden = hidden.double().requires_grad_()
    exact_weight = weight.double().requires_grad_()
    logp = (exact_hidden @ exact_weight[:9000].T).log_softmax(1)
    logp = logp.gather(1, targets[:, None])[:, 0]
    reward = token_reward("power", teacher, logp.detach().float(), a=1.0).double()
    (-reward * logp).sum().backward()

    hidden, targets, teacher = hidden.cuda().requires_grad_(), targets.cuda(), teacher.cuda()
    parameter = torch.nn.Parameter(weight.cuda())
    parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    head = LMHead(weight_VpH=parameter, vocab_size=9000, tp_group=group)

    def rewarded(teacher_n: torch.Tensor, student_n: torch.Tensor) -> torch.Tensor:
        return token_reward("power", teacher_n, student_n, a=1.0)

    if kind == "fused":
        loss, ours, _ = fused_policy_gradient(hidden, head, targets, teacher, rewarded)
    else:
        logprob = recomputed_logprob if kind == "recompute" else materialized_logprob
        ours, _ = logprob(hidden, head, targets)
        loss = (-rewarded(teacher, ours) * ours).sum()
    loss.backward()

    def distance(value: torch.Tensor, exact: torch.Tensor | None) -> float:
        assert exact is not None
        return float((value.detach().cpu().double() - exact.detach()).norm() / exact.norm())

    rounding = torch.finfo(dtype).eps
    assert distance(ours, logp) < 1e-5
    assert distance(score(hidden, head, targets).logp_N, logp) < 1e-5
    assert hidden.grad is not None
    assert distance(hidden.grad, exact_hidden.grad) < max(1e-5, rounding)
    assert distance(parameter.main_grad, exact_weight.grad) < max(1e-5, rounding)
    assert not parameter.main_grad[9000:].any()
