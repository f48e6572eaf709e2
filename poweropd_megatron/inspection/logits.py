"""The logits of a folder on Megatron-Core beside those of `transformers`, both in fp32.

Shapes: T tokens of a row, S positions, B sequences, V vocabulary.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from safetensors.torch import load_file, save_file
from torch import Tensor

from poweropd_megatron.config.schema import ParallelConfig
from poweropd_megatron.errors import InputError
from poweropd_megatron.inspection.findings import SETTING
from poweropd_megatron.inspection.tensors import NamedTensor
from poweropd_megatron.models import hf_weights
from poweropd_megatron.models.build import build_chunks, layer_numbers
from poweropd_megatron.models.families import weights_of
from poweropd_megatron.models.families.weight import Weight
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.model_inputs import check_kernels
from poweropd_megatron.parallel import world
from poweropd_megatron.parallel.layout import Layout, student_layout
from poweropd_megatron.parallel.pipeline import forward_stage


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near two sets of logits are to each other, over all rows."""

    num_tokens: int
    largest_difference: float
    std: float
    """Of the reference, for scale."""
    smallest_cosine: float
    """Of the logits of one position."""
    num_same_argmax: int


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Agreement:
    """Return how near logits are to their reference. Shapes: a [T, V] for each row."""
    found, wanted = torch.cat(list(ours)).double(), torch.cat(list(theirs)).double()
    return Agreement(
        num_tokens=len(wanted),
        largest_difference=float((found - wanted).abs().max()),
        std=float(wanted.std()),
        smallest_cosine=float(torch.cosine_similarity(found, wanted, dim=-1).min()),
        num_same_argmax=int((found.argmax(-1) == wanted.argmax(-1)).sum()),
    )


def of_transformers(folder: Path, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits of a Hugging Face folder for each row of ids.

    Raises: InputError if transformers isn't installed, or fails.
    """
    if find_spec("transformers") is None:
        raise InputError(f"{SETTING}: --logits needs transformers, which isn't installed")
    with tempfile.TemporaryDirectory() as scratch:
        ids_file, logits_file = str(Path(scratch, "ids")), str(Path(scratch, "logits"))
        save_file({str(number): ids for number, ids in enumerate(rows)}, ids_file)
        module = "poweropd_megatron.inspection.transformers_logits"
        done = subprocess.run(
            [sys.executable, "-m", module, str(folder), ids_file, logits_file],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{SETTING}: transformers can't run {folder}: {reason}")
        logits = load_file(logits_file)
        return [logits[str(number)] for number in range(len(rows))]


def of_megatron(
    model: ModelConfig, tensors: Mapping[str, NamedTensor], rows: Sequence[Tensor]
) -> list[Tensor]:
    """Return the logits of a model on Megatron-Core, in this process alone, for each row of ids.

    Raises: InputError if a tensor can't be read, ConfigError if the environment asks for kernels
    that can't be had.
    """
    check_kernels()
    world.hush_libraries()
    device = world.start(timeout_minutes=10)
    try:
        layout = student_layout(ParallelConfig(), device, seed=1)
        chunks = build_chunks(model, layout, dtype="fp32")
        for chunk in chunks:
            rows_of_table = weights_of(model, layer_numbers(chunk))
            source = _WholeTensors(tensors)
            hf_weights.load(chunk.named_parameters(), rows_of_table, source, tp_rank=0, tp_size=1)
            chunk.eval()
        with torch.no_grad():
            return [
                forward_stage(
                    chunks,
                    layout,
                    ids[None],
                    output_processor=all_logits,
                    context=(layout, model.vocab_size),
                )[0].cpu()
                for ids in rows
            ]
    finally:
        dist.destroy_process_group()


class _WholeTensors:
    """Gives the one rank there is all of each tensor."""

    setting = SETTING

    def __init__(self, tensors: Mapping[str, NamedTensor]) -> None:
        self._tensors = tensors

    def read_pieces(self, weight: Weight, *, tp_rank: int, tp_size: int) -> list[Tensor]:
        """Return the row's Hugging Face tensors. Raises: InputError."""
        assert (tp_rank, tp_size) == (0, 1)
        return [self._tensors[name].read() for name in weight.hugging_face]


def all_logits(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    config: Any,
    context: tuple[Layout, int],
    **_: Any,
) -> Tensor:
    """Return the logits of all positions, [B, S, V], in fp32: an output processor of GPTModel.

    context: the layout, and the vocabulary without padding.
    Cost: a gather of the logits over the tensor-parallel ranks.
    """
    layout, vocab_size = context
    if config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=layout.groups.tp)
    weight = output_layer.weight if output_weight is None else output_weight
    own = (hidden_states.transpose(0, 1).float() @ weight.t().float()).contiguous()
    shards = [torch.empty_like(own) for _ in range(layout.tp_size)]
    dist.all_gather(shards, own, group=layout.groups.tp)
    return torch.cat(shards, dim=-1)[..., :vocab_size]
