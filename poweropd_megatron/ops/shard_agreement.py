"""Whether the ranks of a tensor-parallel group work on even shares of one vocabulary.

What a rank has is described by one row of its states, so that it travels with them.
Shapes: N tokens, R ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

_CHECKSUM_PRIME = 2**31 - 1
_AGREED: set[tuple[str, int, int]] = set()
"""Groups, columns and vocabularies of GPUs that were looked at."""


def describe_shard(targets_N: Tensor, *, num_columns: int, vocab_size: int) -> Tensor:
    """Return [1, 4] fp32 whose bits are columns, vocabulary, tokens and a checksum of targets_N."""
    weights_N = 2 * torch.arange(len(targets_N), device=targets_N.device) + 1
    checksum = (targets_N * weights_N).sum() % _CHECKSUM_PRIME
    sizes = targets_N.new_tensor([num_columns, vocab_size, len(targets_N)])
    return torch.cat([sizes, checksum[None]]).to(torch.int32).view(torch.float32)[None]


def check_shards_agree(
    described_R4: Tensor, tp_group: dist.ProcessGroup, *, num_columns: int, vocab_size: int
) -> None:
    """Return if all ranks described the same. Raises: ValueError, on every one of them, otherwise.

    Cost: on a GPU one synchronisation, the first time that a group meets a cut of a vocabulary;
    later a difference ends the process by a device-side assertion.
    """
    described_R4 = described_R4.view(torch.int32)
    if described_R4.is_cuda:
        met = (tp_group.group_name, num_columns, vocab_size)
        if met in _AGREED:
            torch._assert_async(
                (described_R4 == described_R4[0]).all(),
                "the tensor-parallel ranks differ in columns, vocab_size or targets_N",
            )
            return
        _AGREED.add(met)
    columns_R, sizes_R, tokens_R, checksums_R = described_R4.t().tolist()
    if len(set(columns_R)) > 1:
        raise ValueError(
            f"the ranks have {columns_R} columns (of logits_NVp, weight_VpH): expected the same "
            "number on each, padding included"
        )
    for name, values_R in (("vocab_size", sizes_R), ("the length of targets_N", tokens_R)):
        if len(set(values_R)) > 1:
            raise ValueError(f"{name} is {values_R} on the ranks: expected the same on each")
    if len(set(checksums_R)) > 1:
        raise ValueError("targets_N differs between the ranks: expected the same on each")
