"""The CUDA kernels on the SIMT emulator of tests/csrc, as a back-end of the row operations.

Shapes: N tokens (rows), Vp columns of a shard, R shards, 4 a shard's softmax state.
"""

import ctypes
import os
import platform
import shutil
import subprocess
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_uint, c_void_p
from pathlib import Path

import torch
from support.launch_structs import (
    Combined,
    LogitRows,
    RowScales,
    combined,
    logit_rows,
    row_scales,
)
from torch import Tensor

from poweropd_megatron.ops.compiled_rows import CompiledRows

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "csrc"
COMPILE = ["g++", "-std=c++17", "-shared", "-fPIC", "-fno-gnu-unique", "-fno-strict-aliasing"]
"""A unique symbol would be one for all builds in a process; CUDA's 16-byte loads alias logits."""
PLAIN = ("-O2",)
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

ARGUMENTS = {
    "simt_seed": (c_uint,),
    "simt_row_stats": (LogitRows, c_void_p, c_void_p, c_bool, c_bool, c_int),
    "simt_combine": (c_void_p, c_int64, c_int64, c_void_p, Combined),
    "simt_token_reward": (c_int, c_void_p, c_void_p, c_int64, c_float, c_float, c_void_p),
    "simt_row_grad": (LogitRows, c_void_p, RowScales, c_int),
}


class EmulationError(Exception):
    """What the emulator found wrong."""


def why_not() -> str | None:
    """Return why the emulator can't be built here, None if it can."""
    if platform.machine() != "x86_64":
        return f"the SIMT emulator needs x86-64, this is {platform.machine()}"
    return None if shutil.which("g++") else "the SIMT emulator needs g++"


def build(library: Path, *, csrc: Path = CSRC, flags: tuple[str, ...] = PLAIN) -> Path:
    """Return the library, built of the kernels in a csrc folder."""
    include = [f"-I{folder}" for folder in (csrc, csrc / "cuda", EMULATOR)]
    source = EMULATOR / "simt_library.cpp"
    command = [*COMPILE, *flags, *include, str(source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return library


def simt_rows(library: Path, *, block: int = 0, seed: int = 0) -> CompiledRows:
    """Return the kernels in a seed's order, with so many threads per row (0: they choose)."""
    return CompiledRows(SimtModule(library, block=block, seed=seed))


def sanitizer_environment() -> dict[str, str]:
    """Return the environment in which Python runs the tests' code on a sanitized library."""
    sanitizers = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(sanitizers),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }


class SimtModule:
    """What csrc/cuda/module.cpp makes of the kernels, over the emulator."""

    def __init__(self, library: Path, *, block: int, seed: int) -> None:
        self._library = ctypes.CDLL(str(library))
        self._block = block
        self._seed = seed
        for name, arguments in ARGUMENTS.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = None if name == "simt_seed" else c_char_p

    def _call(self, name: str, *arguments: object) -> None:
        self._library.simt_seed(self._seed)
        message = getattr(self._library, name)(*arguments)
        if message:
            raise EmulationError(message.decode())

    def row_stats(
        self,
        logits_NVp: Tensor,
        targets_N: Tensor,
        stats_N4: Tensor,
        first_column: int,
        columns: int,
        with_entropy: bool,
        accumulate: bool,
    ) -> None:
        """Write the states of the rows, or add to them."""
        if not accumulate:
            stats_N4.fill_(torch.nan)
        rows = logit_rows(logits_NVp, first_column, columns)
        pointers = targets_N.data_ptr(), stats_N4.data_ptr()
        self._call("simt_row_stats", rows, *pointers, with_entropy, accumulate, self._block)

    def combine(self, stats_RN4: Tensor, targets_N: Tensor, *results: Tensor | None) -> None:
        """Write one softmax of the states of all shards."""
        sizes = stats_RN4.shape[0], len(targets_N)
        out = combined(*results)
        self._call("simt_combine", stats_RN4.data_ptr(), *sizes, targets_N.data_ptr(), out)

    def token_reward(
        self, kind: int, teacher_N: Tensor, student_N: Tensor, a: float, b: float, reward_N: Tensor
    ) -> None:
        """Write the reward of each token."""
        reward_N.fill_(torch.nan)
        logps = teacher_N.data_ptr(), student_N.data_ptr()
        size, out = len(reward_N), reward_N.data_ptr()
        self._call("simt_token_reward", kind, *logps, size, a, b, out)

    def row_grad(
        self,
        logits_NVp: Tensor,
        targets_N: Tensor,
        maximum_N: Tensor,
        inverse_sum_N: Tensor,
        grad_N: Tensor,
        first_column: int,
        columns: int,
    ) -> None:
        """Overwrite the logits with their gradient."""
        rows = logit_rows(logits_NVp, first_column, columns)
        scales = row_scales(maximum_N, inverse_sum_N, grad_N)
        self._call("simt_row_grad", rows, targets_N.data_ptr(), scales, self._block)
