"""A GPU's memory is free while a frozen model's parameters are on the CPU."""

import pytest
import torch

from poweropd_megatron.models.offload import OffloadedParameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_unloading_frees_the_memory_of_the_parameters_and_loading_brings_their_bits():
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    parameters = [
        torch.nn.Parameter(torch.randn(1 << 20, device=device, dtype=dtype), requires_grad=False)
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    ]
    values = [parameter.detach().cpu() for parameter in parameters]
    offloaded = OffloadedParameters(parameters, device)
    assert offloaded.num_bytes == 8 << 20
    assert torch.cuda.memory_allocated() == before
    for _ in range(2):
        offloaded.load()
        assert torch.cuda.memory_allocated() == before + offloaded.num_bytes
        assert all(parameter.is_cuda for parameter in parameters)
        sums = [parameter.detach().double().sum() for parameter in parameters]
        offloaded.unload()
        assert torch.cuda.memory_allocated() == before + 3 * 512
        assert all(parameter.is_pinned() for parameter in parameters)
        for parameter, value, total in zip(parameters, values, sums, strict=True):
            assert torch.equal(parameter.detach(), value)
            torch.testing.assert_close(total.cpu(), value.double().sum())
        del sums
