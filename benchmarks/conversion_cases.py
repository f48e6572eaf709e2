"""Folders to convert, made from a seed, and what a command on one takes."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poweropd_megatron.conversion.hf_tensors import make_header
from poweropd_megatron.models.families import hugging_face_shapes, read_model_config

_COMMON = {
    "vocab_size": 151936,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}
_DENSE = {**_COMMON, "model_type": "qwen3", "num_attention_heads": 16, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "0.6B": {
        **_DENSE,
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
    },
    "1.7B": {
        **_DENSE,
        "num_hidden_layers": 28,
        "hidden_size": 2048,
        "intermediate_size": 6144,
    },
    "30B-A3B, 2 layers": {
        **_COMMON,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}
QUICK: dict[str, dict[str, Any]] = {
    "0.6B": {**MODELS["0.6B"], "num_hidden_layers": 2, "vocab_size": 4000},
}
_FILE_BYTES = 10**9


def make_folder(folder: Path, config: dict[str, Any]) -> int:
    """Write a Hugging Face folder of random bf16; return the bytes of its tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = hugging_face_shapes(read_model_config(folder, setting="made"))
    random = np.random.default_rng(0)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * prod(other) for other in groups[-1].values()) > _FILE_BYTES:
            groups.append({})
        groups[-1][name] = shape
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, _ = make_header({name: (torch.bfloat16, shape) for name, shape in group.items()})
        with (folder / file_name).open("wb") as file:
            file.write(header)
            for shape in group.values():
                for start in range(0, 2 * prod(shape), 2**24):
                    file.write(random.bytes(min(2**24, 2 * prod(shape) - start)))
            file.flush()
            os.fsync(file.fileno())
        weight_map |= dict.fromkeys(group, file_name)
    num_bytes = sum(2 * prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_bytes


@dataclass(frozen=True)
class Taken:
    """What a command took."""

    seconds: float
    peak_bytes: int
    """Resident memory of its largest process."""


_IMPORTS = (
    "import poweropd_megatron.conversion.{module} as module, torch, sys; from pathlib import Path"
)


def run_command(command: Sequence[str]) -> Taken:
    """Return what a command took, until its output was on the disk."""
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    return _taken(process, begin, lambda: process.poll() is not None)


def run_python(module: str, call: str) -> Taken:
    """Return what a call of a module took in a process that had imported it before."""
    code = f"{_IMPORTS.format(module=module)}; print(); sys.stdin.readline(); {call}; print()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        os.sync()
        begin = time.perf_counter()
        process.stdin.write(b"\n")
        stdout = process.stdout
        taken = _taken(process, begin, lambda: bool(select.select([stdout], [], [], 0)[0]))
    if process.returncode != 0:
        sys.exit(f"{call} failed")
    return taken


def _taken(process: subprocess.Popen[bytes], begin: float, is_done: Callable[[], bool]) -> Taken:
    peak_bytes = 0
    while True:
        peak_bytes = max(peak_bytes, *(_peak_bytes(pid) for pid in _family(process.pid)))
        if is_done():
            break
        time.sleep(0.01)
    os.sync()
    return Taken(time.perf_counter() - begin, peak_bytes)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache. Source: posix_fadvise(2), POSIX_FADV_DONTNEED."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    """Read a folder's files into the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**22):
                    pass


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *map(int, children)]


def _peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else 0
