"""Bugs to be seeded into the CUDA kernels, each of which the tests have to notice."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Catcher = Literal["simt", "sanitizer", "ptx"]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A bug: text of a file in csrc that stands there `times` times, and what replaces it."""

    name: str
    file: str
    text: str
    replacement: str
    times: int = 1
    caught_by: tuple[Catcher, ...] = ("simt",)

    def seed(self, csrc: Path) -> None:
        """Put the bug into a copy of csrc."""
        path = csrc / self.file
        source = path.read_text()
        if source.count(self.text) != self.times:
            raise ValueError(
                f"{self.name}: {self.file} has {source.count(self.text)} {self.text!r}"
            )
        path.write_text(source.replace(self.text, self.replacement))


def _kernels(
    name: str,
    text: str,
    replacement: str,
    times: int = 1,
    caught_by: tuple[Catcher, ...] = ("simt",),
) -> Mutant:
    return Mutant(
        name=name,
        file="cuda/row_kernels.cuh",
        text=text,
        replacement=replacement,
        times=times,
        caught_by=caught_by,
    )


def _numerics(name: str, text: str, replacement: str) -> Mutant:
    return Mutant(name=name, file="numerics.h", text=text, replacement=replacement)


MUTANTS = (
    _kernels("no barrier", "  __syncthreads();\n", "", caught_by=("simt", "ptx")),
    _kernels(
        "barrier in a divergent branch",
        "  if (lane == 0) {\n",
        "  if (lane == 0) {\n    __syncthreads();\n",
        caught_by=("simt", "ptx"),
    ),
    _kernels(
        "shuffle without half of the warp",
        "__shfl_xor_sync(0xffffffffu, state.sum",
        "__shfl_xor_sync(0x0000ffffu, state.sum",
        caught_by=("simt", "ptx"),
    ),
    _kernels(
        "a thread returns before the shuffles",
        "  state = block_merge<kBlock>(state);\n",
        "  if (thread == 5 && columns < 9) return;\n  state = block_merge<kBlock>(state);\n",
        caught_by=("simt", "ptx"),
    ),
    _kernels("short butterfly", "int offset = kWarp / 2;", "int offset = kWarp / 4;"),
    _kernels(
        "shared array too small",
        "sums[kWarps], weighted",
        "sums[(kWarps + 1) / 2], weighted",
        caught_by=("sanitizer", "ptx"),
    ),
    _kernels(
        "misalignment not peeled",
        "head = ((16 - misaligned) & 15) / int(sizeof(T));",
        "head = 0 * misaligned;",
        caught_by=("sanitizer", "ptx"),
    ),
    _kernels(
        "quads beyond the end of the row",
        "quads = (columns - head) / Quad<T>::kSize;",
        "quads = (columns - head + Quad<T>::kSize - 1) / Quad<T>::kSize;",
        caught_by=("simt", "ptx"),
    ),
    _kernels(
        "quads before the first line written twice",
        "int i = parts.lead + thread;",
        "int i = thread;",
    ),
    _kernels(
        "quads before the first line not written",
        "if (thread < parts.lead) write_quad(thread);",
        "",
    ),
    _kernels("tail dropped", "if (parts.tail + thread < columns) {", "if (false) {"),
    _kernels(
        "gradient of the tail dropped",
        "if (parts.tail + thread < columns) write_one(parts.tail + thread);",
        "",
    ),
    _kernels("no rescaling to a new maximum", "    state.sum *= scale;\n", ""),
    _kernels("NaN lost", "if (value[i] != value[i]) state.sum = value[i];", ""),
    _kernels("0 * -inf in the weighted sum", "fmaxf(exponent, kLowestExponent)", "exponent"),
    _kernels("ignored rows read", "if (target == kIgnoredTarget) {", "if (false) {"),
    _kernels("shard's offset ignored", "column = target - first_column;", "column = target;"),
    _kernels(
        "shard's offset ignored in the gradient",
        "offset = targets[row] - first_column;",
        "offset = targets[row];",
    ),
    _kernels("row's offset of 32 bits", "row * stride", "int(row * stride)", times=2),
    _kernels("earlier tiles ignored", "state = merge({before.x, before.y, before.w}, state);", ""),
    _kernels(
        "target of an earlier tile forgotten",
        "target_logit : before.z;",
        "target_logit : target_logit;",
    ),
    _kernels("one shard too few", "shard < shards;", "shard < shards - 1;"),
    _kernels(
        "states of the ranks mixed up", "stats[shard * rows + row]", "stats[row * shards + shard]"
    ),
    _kernels(
        "states of another order of ranks",
        "for (int shard = 0; shard < shards; ++shard)",
        "for (int shard = shards - 1; shard >= 0; --shard)",
    ),
    _kernels(
        "combine: the first block's rows in every block",
        "blockIdx.x * int64_t(blockDim.x) + threadIdx.x;\n  if (row >= rows) return;",
        "threadIdx.x;\n  if (row >= rows) return;",
    ),
    Mutant(
        name="combine: one block for all rows",
        file="cuda/launch.cu",
        text="dim3(unsigned((rows + kTokensPerBlock - 1) / kTokensPerBlock)),\n"
        "                  dim3(kTokensPerBlock), stream, reinterpret_cast<const float4*>(stats)",
        replacement="dim3(1u),\n"
        "                  dim3(kTokensPerBlock), stream, reinterpret_cast<const float4*>(stats)",
    ),
    _kernels("no one-hot", "column == target ? grad : 0.0f", "0.0f"),
    _kernels("rows without a gradient read", "if (grad == 0.0f) columns = 0;", ""),
    _kernels("padding not blanked", "rest(begin + columns, width - columns);", "rest(begin, 0);"),
    _numerics(
        "no guard of an empty shard",
        "if (maximum == negative_infinity()) return {maximum, a.sum + b.sum, 0.0f};",
        "",
    ),
    _numerics(
        "NaN of an empty shard lost", "{maximum, a.sum + b.sum, 0.0f}", "{maximum, 0.0f, 0.0f}"
    ),
    _numerics(
        "large logits rounded",
        "(target_logit - state.maximum) - logf(state.sum)",
        "target_logit - (state.maximum + logf(state.sum))",
    ),
    _numerics(
        "difference of powers",
        "expf(a * larger) * -expm1f(-a * fabsf(difference))",
        "fabsf(expf(a * teacher) - expf(a * student))",
    ),
    Mutant(
        name="bf16 truncated",
        file="cuda/port.h",
        text="(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16",
        replacement="bits >> 16",
    ),
    Mutant(
        name="halves of a word of bf16 swapped",
        file="cuda/port.h",
        text='"f"(high), "f"(low)',
        replacement='"f"(low), "f"(high)',
        caught_by=("ptx",),
    ),
    Mutant(
        name="exponential of another base on the device",
        file="numerics.h",
        text='"f"(x * kLog2e)',
        replacement='"f"(x)',
        caught_by=("ptx",),
    ),
)
