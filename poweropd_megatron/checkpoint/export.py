"""The student as a Hugging Face folder, gathered from its shards one parameter at a time."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from poweropd_megatron.errors import InputError
from poweropd_megatron.models import hf_weights
from poweropd_megatron.models.build import layer_numbers
from poweropd_megatron.models.families import hugging_face_shapes, weights_of
from poweropd_megatron.models.hf_folder import INDEX_NAME, HFFolder
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.other_files import copy_other_files
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.world import agreed
from poweropd_megatron.train.student import Student

MAX_SHARD_BYTES = 5 * 10**9


def export(student: Student, model: ModelConfig, *, reference: str, target: Path) -> Path:
    """Return `target`, a folder that `transformers` loads. Called by all ranks.

    One rank of each pipeline stage writes its layers, in files of at most 5 GB; every other file
    (tokenizer, config.json, generation_config.json) is copied from the folder that the student came
    from, but that config.json states the type of the exported tensors. The folder appears by one
    rename; an older export is replaced.
    Cost: a gather of each parameter over the tensor-parallel ranks, or an expert's over the
    expert-parallel ones; memory of one output file on
    the writers.
    Raises: InputError on all ranks if the files can't be written, or don't hold exactly the
    reference's tensors.
    """
    layout = student.layout
    partial = target.with_name(f".{target.name}.partial")
    is_first = dist.get_rank() == 0
    student.finish_param_gather()
    agreed(lambda: _copy_other_files(student, Path(reference), partial) if is_first else None)
    written = agreed(lambda: _write_stage(student, model, layout, partial))
    by_rank: list[dict[str, dict[str, int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, written)
    agreed(lambda: _finish(by_rank, model, partial, target) if is_first else None)
    return target


def _copy_other_files(student: Student, reference: Path, partial: Path) -> None:
    dtype = next(student.chunks[0].parameters()).dtype
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_other_files(reference, partial, dtype=dtype, setting="student.path")
    except OSError as error:
        raise InputError(f"output_dir: {partial} can't be written: {error}") from None


def _write_stage(
    student: Student, model: ModelConfig, layout: Layout, partial: Path
) -> dict[str, dict[str, int]]:
    """Return file -> tensor -> bytes of what was written: empty but on a stage's one writer."""
    writes = layout.holds_model and layout.tp_rank == 0 and layout.copy_rank == 0
    written: dict[str, dict[str, int]] = {}
    pending: dict[str, Tensor] = {}
    failure: InputError | None = None

    def flush() -> None:
        nonlocal failure
        if pending:
            name = f"stage{layout.pp_rank:03d}-{len(written):05d}.safetensors"
            try:
                save_file(pending, partial / name, metadata={"format": "pt"})
            except (SafetensorError, OSError) as error:
                failure = InputError(f"output_dir: {partial / name} can't be written: {error}")
            written[name] = {key: value.nbytes for key, value in pending.items()}
            pending.clear()

    # After a failure the gathers go on, because the other ranks wait in them.
    for name, tensor in _stage_tensors(student, model, layout):
        if writes and failure is None:
            if sum(value.nbytes for value in pending.values()) + tensor.nbytes > MAX_SHARD_BYTES:
                flush()
            pending[name] = tensor.contiguous()
    flush()
    if failure is not None:
        raise failure
    return written


def _stage_tensors(
    student: Student, model: ModelConfig, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """Yield this stage's tensors under their Hugging Face names, on the CPU."""
    for chunk in student.chunks:
        yield from _chunk_tensors(chunk, model, layout)


def _chunk_tensors(
    chunk: GPTModel, model: ModelConfig, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    layers = layer_numbers(chunk)
    tables = [
        {
            weight.megatron: weight
            for weight in weights_of(model, layers, ep_rank=ep_rank, ep_size=layout.ep_size)
        }
        for ep_rank in range(layout.ep_size)
    ]
    for name, parameter in chunk.named_parameters():
        weight = tables[layout.ep_rank][name]
        if weight.is_copy:
            continue
        shard = parameter.detach()
        if weight.is_expert:
            shards = _gather(shard, layout.groups.ep)
            for table, part in zip(tables, shards, strict=True):
                yield from hf_weights.to_hugging_face(
                    table[name], [part], vocab_size=model.vocab_size
                )
            continue
        shards = [shard.cpu()] if weight.dim is None else _gather(shard, layout.groups.tp)
        yield from hf_weights.to_hugging_face(weight, shards, vocab_size=model.vocab_size)


def _gather(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the shards of a group's ranks, on the CPU."""
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return [part.cpu() for part in shards]


def _finish(
    by_rank: list[dict[str, dict[str, int]]],
    model: ModelConfig,
    partial: Path,
    target: Path,
) -> None:
    """Give the files their final names, write the index, check the tensors, and publish."""
    files = [(name, sizes) for written in by_rank for name, sizes in sorted(written.items())]
    weight_map: dict[str, str] = {}
    for number, (name, sizes) in enumerate(files, start=1):
        final = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        shutil.copymode(partial / "config.json", partial / name)  # safetensors writes 0600
        (partial / name).rename(partial / final)
        weight_map |= dict.fromkeys(sizes, final)
    if len(files) > 1:
        total_size = sum(size for _, sizes in files for size in sizes.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    expected = hugging_face_shapes(model).keys()
    found = HFFolder(partial, setting="export").names()
    if found != expected:
        raise InputError(
            f"export: {partial} differs from student.path in {sorted(found ^ expected)[:5]}"
        )
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
