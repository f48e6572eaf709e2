"""What nvcc makes of the CUDA kernels, interpreted, as a back-end of the row operations.

Shapes: N tokens (rows), Vp columns of a shard, R shards, 4 a shard's softmax state.
"""

import re
import shutil
import subprocess
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, Literal

import torch
from support.launch_structs import combined, row_scales
from support.ptx.interpreter import Launch
from support.ptx.memory import GlobalMemory
from support.ptx.program import Kernel, parse
from torch import Tensor

from poweropd_megatron.ops.backends import IGNORED_TARGET
from poweropd_megatron.ops.compiled_rows import CompiledRows

CSRC = Path(__file__).parents[2] / "csrc"
COMPILE = ["nvcc", "-ptx", "-arch=sm_90", "-O3", "-std=c++17"]
TOKENS_PER_BLOCK = 128
TYPE_NAMES = {torch.float32: "f", torch.bfloat16: r"N\w*?4bf16E"}


def why_not() -> str | None:
    """Return why PTX can't be made here, None if it can."""
    return None if shutil.which("nvcc") else "PTX needs nvcc"


def compile_kernels(ptx: Path, *, csrc: Path = CSRC) -> dict[str, Kernel]:
    """Return the kernels of a csrc folder by their mangled names."""
    include = [f"-I{csrc}", f"-I{csrc / 'cuda'}"]
    command = [*COMPILE, *include, str(csrc / "cuda" / "launch.cu"), "-o", str(ptx)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return parse(ptx.read_text())


def coverage(kernels: dict[str, Kernel]) -> float:
    """Return the executed share of all instructions."""
    executed = sum(len(kernel.executed) for kernel in kernels.values())
    return executed / sum(len(kernel.instructions) for kernel in kernels.values())


def ptx_rows(
    kernels: dict[str, Kernel],
    *,
    block: int,
    order: Literal["min", "max"] = "min",
    noise: int | None = None,
) -> CompiledRows:
    """Return the kernels with a number of threads per row; see Launch for order and noise."""
    return CompiledRows(PtxModule(kernels, block=block, order=order, noise=noise))


class PtxModule:
    """What csrc/cuda/module.cpp makes of the kernels, over the interpreter.

    A kernel may read no column but the vocabulary's, and no row that is ignored or unrewarded.
    """

    def __init__(self, kernels: dict[str, Kernel], *, block: int, **how: Any) -> None:
        self._kernels = kernels
        self._block = block
        self._how = how

    def _run(
        self, pattern: str, grid: int, block: int, memory: GlobalMemory, *arguments: Any
    ) -> None:
        (kernel,) = (kernel for name, kernel in self._kernels.items() if re.search(pattern, name))
        if grid:
            packed = [bytes(argument) for argument in arguments]
            shape = {"grid": grid, "block": block}
            Launch(kernel, **shape, arguments=packed, memory=memory, **self._how).run()

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
        memory = GlobalMemory()
        for number in (targets_N != IGNORED_TARGET).nonzero()[:, 0].tolist():
            memory.allow(logits_NVp[number, :columns], read=True)
        memory.allow(targets_N, read=True)
        memory.allow(stats_N4, read=accumulate, write=True)
        kind = TYPE_NAMES[logits_NVp.dtype]
        self._run(
            f"row_stats_kernelI{kind}Lb{with_entropy:d}ELb{accumulate:d}ELi{self._block}E",
            len(targets_N),
            self._block,
            memory,
            c_void_p(logits_NVp.data_ptr()),
            c_int64(logits_NVp.stride(0)),
            c_void_p(targets_N.data_ptr()),
            c_void_p(stats_N4.data_ptr()),
            c_int64(first_column),
            c_int32(columns),
        )

    def combine(self, stats_RN4: Tensor, targets_N: Tensor, *results: Tensor | None) -> None:
        """Write one softmax of the states of all shards."""
        out = combined(*results)
        memory = GlobalMemory()
        memory.allow(stats_RN4.view(-1), read=True)
        memory.allow(targets_N, read=True)
        for result in results:
            if result is not None:
                memory.allow(result, write=True)
        self._run(
            "combine_kernel",
            -(-len(targets_N) // TOKENS_PER_BLOCK),
            TOKENS_PER_BLOCK,
            memory,
            c_void_p(stats_RN4.data_ptr()),
            c_int32(stats_RN4.shape[0]),
            c_int64(len(targets_N)),
            c_void_p(targets_N.data_ptr()),
            out,
        )

    def token_reward(
        self, kind: int, teacher_N: Tensor, student_N: Tensor, a: float, b: float, reward_N: Tensor
    ) -> None:
        """Write the reward of each token."""
        reward_N.fill_(torch.nan)
        memory = GlobalMemory()
        memory.allow(teacher_N, read=True)
        memory.allow(student_N, read=True)
        memory.allow(reward_N, write=True)
        self._run(
            "token_reward_kernel",
            -(-len(reward_N) // TOKENS_PER_BLOCK),
            TOKENS_PER_BLOCK,
            memory,
            c_int32(kind),
            c_void_p(teacher_N.data_ptr()),
            c_void_p(student_N.data_ptr()),
            c_int64(len(reward_N)),
            c_float(a),
            c_float(b),
            c_void_p(reward_N.data_ptr()),
        )

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
        memory = GlobalMemory()
        memory.allow(logits_NVp, write=True)
        for number in grad_N.nonzero()[:, 0].tolist():
            memory.allow(logits_NVp[number, :columns], read=True)
        for values in (targets_N, maximum_N, inverse_sum_N, grad_N):
            memory.allow(values, read=True)
        self._run(
            f"row_grad_kernelI{TYPE_NAMES[logits_NVp.dtype]}Li{self._block}E",
            len(targets_N),
            self._block,
            memory,
            c_void_p(logits_NVp.data_ptr()),
            c_int64(logits_NVp.stride(0)),
            c_void_p(targets_N.data_ptr()),
            row_scales(maximum_N, inverse_sum_N, grad_N),
            c_int64(first_column),
            c_int32(columns),
            c_int32(logits_NVp.shape[1]),
        )
