"""Which rank routes which tokens: each token goes to its experts once, on whatever rank."""

import pytest
import torch
from comparison import error
from layout_rows import parallel
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from support.rank_pool import RankPool
from torch import Tensor

from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.models.build import build_model
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.parallel import cpu_device
from poweropd_megatron.parallel.layout import student_layout

IDS_BS = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]])


@torch.no_grad()
def route_as_in_decoding(layout: ParallelConfig, folder: str, ids_BS: Tensor) -> tuple[int, Tensor]:
    """Return how many tokens this rank's first router saw, and its MoE layer's output."""
    cpu_device.install()
    place = student_layout(layout, torch.device("cpu"), seed=1)
    model = read_model_config(folder, setting="student.path")
    [chunk] = build_model(model, place, folder=folder, dtype="fp32", setting="student.path")
    chunk.eval()
    set_model_to_sequence_parallel(chunk, False)
    seen: dict[str, Tensor] = {}
    moe = chunk.decoder.layers[0].mlp
    moe.router.register_forward_hook(lambda _m, inputs, _o: seen.update(tokens=inputs[0]))
    moe.register_forward_hook(lambda _m, _i, output: seen.update(output=output[0]))
    chunk(input_ids=ids_BS, position_ids=None, attention_mask=None)
    return seen["tokens"].flatten(0, 1).shape[0], seen["output"]


@pytest.mark.parametrize("expert", [1, 2])
@pytest.mark.parametrize("ids_BS", [IDS_BS, IDS_BS[:, :1], IDS_BS[:1, :1]], ids=["9", "3", "1"])
def test_without_sequence_parallelism_tensor_ranks_share_the_tokens_and_have_all_results(
    expert: int, ids_BS: Tensor, folders: dict[str, str], ranks: RankPool
) -> None:
    folder = folders["student-experts"]
    [(count, expected)] = ranks.run(route_as_in_decoding, parallel(), folder, ids_BS, world_size=1)
    assert count == ids_BS.numel()
    by_rank = ranks.run(
        route_as_in_decoding,
        parallel(2, expert=expert, sequence=True),
        folder,
        ids_BS,
        world_size=2,
    )
    for share, output in by_rank:
        assert share == -(-count // 2)
        assert torch.equal(output, by_rank[0][1])
        assert error(output, expected) <= 1e-5
