"""Parameters that leave the device between phases; a second copy on the CPU stands for a GPU's."""

import pytest
import torch

from poweropd_megatron.models.offload import OffloadedParameters

CPU = torch.device("cpu")


def frozen(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype), requires_grad=False)
        for shape in shapes
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_parameters_have_their_bits_in_one_aligned_buffer(dtype):
    parameters = frozen((3, 5), (1,), (129,), dtype=dtype)
    values = [parameter.data.clone() for parameter in parameters]
    offloaded = OffloadedParameters(parameters, CPU)
    at_home = [parameter.data_ptr() for parameter in parameters]
    assert offloaded.load() > 0
    assert offloaded.load() == 0
    assert all(map(torch.equal, (p.data for p in parameters), values))
    assert not set(at_home) & {parameter.data_ptr() for parameter in parameters}
    starts = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    assert len(starts) == 1
    offsets = [parameter.data_ptr() - min(starts) for parameter in parameters]
    assert all(offset % 256 == 0 for offset in offsets)
    offloaded.unload()
    assert [parameter.data_ptr() for parameter in parameters] == at_home
    assert all(map(torch.equal, (p.data for p in parameters), values))


def test_a_parameter_with_two_uses_is_kept_once_and_stays_one():
    shared, other = frozen((64,), (64,))
    layer = torch.nn.Module()
    layer.embedding, layer.head, layer.norm = shared, shared, other
    offloaded = OffloadedParameters([shared, other, shared], CPU)
    assert offloaded.num_bytes == 2 * 64 * 4
    offloaded.load()
    assert layer.embedding is layer.head
