"""Writes what a conversion for Megatron leaves, with nothing but torch's own checkpoint writer."""

import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from poweropd_megatron.models.families import read_model_config, stored_tensors


def global_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a Hugging Face folder with one file as torch_dist has them."""
    tensors = load_file(folder / "model.safetensors")
    stored = {}
    for tensor in stored_tensors(read_model_config(folder, setting="made")):
        parts = [
            weight.merge([tensors[name] for name in weight.hugging_face])
            for _, weight in tensor.parts()
        ]
        stored[tensor.key] = torch.stack(parts).reshape(tensor.shape)
    return stored


def write(folder: Path, target: Path) -> Path:
    """Return `target`, a converted folder made of a Hugging Face folder."""
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
    write_weights(target / "weights", global_tensors(folder))
    return target


def write_weights(folder: Path, stored: dict[str, Tensor]) -> None:
    """Write a torch_dist folder in the place of the one that is there."""
    shutil.rmtree(folder, ignore_errors=True)
    dcp.save(stored, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
