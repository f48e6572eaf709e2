"""Runs kernels of PTX on the CPU: each thread of each block is a lane of numpy arrays."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from support.ptx.arithmetic import EX2_ERROR, TYPES, evaluate, source_types
from support.ptx.memory import GlobalMemory, PtxError, SharedMemory
from support.ptx.program import Instruction, Kernel

Array = NDArray[np.generic]
Lanes = NDArray[np.intp]

WARP = 32
EXITED = -1
EVERY_LANE = 0xFFFFFFFF


class Launch:
    """A grid of one kernel; run() executes it to its end or raises a PtxError.

    order: whether the lanes that are furthest behind ("min") or ahead ("max") run first.
    noise: seed of an error of up to EX2_ERROR in every ex2, None for exact ones.
    """

    def __init__(
        self,
        kernel: Kernel,
        *,
        grid: int,
        block: int,
        arguments: list[bytes],
        memory: GlobalMemory,
        order: Literal["min", "max"] = "min",
        noise: int | None = None,
    ) -> None:
        if [len(argument) for argument in arguments] != list(kernel.parameters.values()):
            raise ValueError(f"{kernel.name} takes {kernel.parameters}, got {arguments}")
        self._kernel = kernel
        self._leaders = set(kernel.labels.values())
        self._barriers = [
            index for index, each in enumerate(kernel.instructions) if each.name == "bar"
        ]
        self._arguments = dict(zip(kernel.parameters, arguments, strict=True))
        self._memory = memory
        self._shared = SharedMemory(grid, kernel.shared.values())
        self._pick = np.min if order == "min" else np.max
        self._noise = None if noise is None else np.random.default_rng(noise)
        self._block = np.repeat(np.arange(grid, dtype=np.uint32), block)
        self._thread = np.tile(np.arange(block, dtype=np.uint32), grid)
        self._special = {
            "%tid.x": self._thread,
            "%ctaid.x": self._block,
            "%ntid.x": np.full(grid * block, block, np.uint32),
        }
        self._registers = {
            name: np.zeros(grid * block, TYPES[kind.replace("f", "b")])
            for name, kind in kernel.registers.items()
        }
        self._at = np.zeros(grid * block, np.intp)
        self._waits = np.zeros(grid * block, bool)
        self._block_size = block

    def run(self) -> None:
        """Execute until every lane has returned."""
        with np.errstate(all="ignore"):
            while True:
                runnable = np.nonzero((self._at != EXITED) & ~self._waits)[0]
                if len(runnable):
                    at = self._at[runnable]
                    start = int(self._pick(at))
                    self._run_basic_block(start, runnable[at == start])
                elif (self._at == EXITED).all():
                    return
                elif not (self._pass_shuffles() | self._pass_barriers()):
                    raise PtxError("deadlock: a barrier or shuffle is not reached by all")

    def _run_basic_block(self, index: int, lanes: Lanes) -> None:
        while True:
            instruction = self._kernel.instructions[index]
            self._kernel.executed.add(index)
            held = self._held(instruction, lanes)
            match instruction.name:
                case "bra":
                    target = self._kernel.labels[instruction.operands[0]]
                    self._at[lanes] = np.where(held, target, index + 1)
                    return
                case "ret":
                    self._at[lanes] = np.where(held, EXITED, index + 1)
                    return
                case "bar" | "shfl":
                    self._at[lanes] = index
                    self._waits[lanes] = True
                    return
            self._execute(instruction, lanes if held is True else lanes[held])
            index += 1
            if index in self._leaders:
                self._at[lanes] = index
                return

    def _held(self, instruction: Instruction, lanes: Lanes) -> Array | bool:
        """Return which lanes an instruction's predicate lets through."""
        if instruction.predicate is None:
            return True
        return self._registers[instruction.predicate][lanes] ^ instruction.negated

    def _execute(self, instruction: Instruction, lanes: Lanes) -> None:
        space = instruction.modifiers[0] if instruction.name in ("ld", "st") else None
        match instruction.name, space:
            case "ld", "param":
                self._load_parameter(instruction, lanes)
            case "ld", "global":
                self._load_global(instruction, lanes)
            case "st", "global":
                self._store_global(instruction, lanes)
            case "ld" | "st", "shared":
                self._access_shared(instruction, lanes)
            case _:
                target, *operands = instruction.operands
                types = source_types(instruction)
                sources = [
                    self._read(operand, kind, lanes)
                    for operand, kind in zip(operands, types, strict=True)
                ]
                value = evaluate(instruction, sources)
                if instruction.name == "ex2" and self._noise:
                    value = self._disturb(sources[0], value)
                self._write(target, lanes, value)

    def _disturb(self, exponent: Array, power: Array) -> Array:
        """Return powers of 2 with an error, save those of integers: CUDA's expm1f needs them."""
        error = EX2_ERROR * self._noise.uniform(-1, 1, power.shape)
        exact = exponent == np.rint(exponent)
        return np.where(exact, power, power * (1 + error)).astype(np.float32)

    def _read(self, operand: str, kind: str, lanes: Lanes) -> Array:
        dtype = TYPES[kind]
        if operand in self._special:
            return self._special[operand][lanes].astype(dtype)
        if operand.startswith("%"):
            values = self._registers[operand][lanes]
            if values.dtype.itemsize != dtype.itemsize:
                values = values.astype(f"u{dtype.itemsize}")
            return values.view(dtype)
        if operand in self._kernel.shared:
            return np.array(self._kernel.shared[operand].start, dtype)
        if operand.startswith("0f"):
            return np.array(int(operand[2:], 16), np.uint32).view(np.float32)
        bits = int(operand, 0) & ((1 << 8 * dtype.itemsize) - 1)
        return np.array(bits, f"u{dtype.itemsize}").view(dtype)

    def _write(self, register: str, lanes: Lanes, values: Array) -> None:
        """Write values, signed ones extended with their sign where the register is wider."""
        stored = self._registers[register]
        if values.dtype.kind == "f":
            values = values.view(f"u{values.dtype.itemsize}")
        stored[lanes] = values.astype(stored.dtype)

    def _address(self, operand: str, kind: str, lanes: Lanes) -> Array:
        base, _, offset = operand.strip("[]").partition("+")
        address = self._read(base, kind, lanes)
        return np.broadcast_to(address + self._read(offset or "0", kind, lanes), lanes.shape)

    def _load_parameter(self, instruction: Instruction, lanes: Lanes) -> None:
        name, _, offset = instruction.operands[1].strip("[]").partition("+")
        dtype = TYPES[instruction.type]
        value = np.frombuffer(self._arguments[name], dtype, 1, int(offset or 0))
        self._write(instruction.operands[0], lanes, value)

    def _load_global(self, instruction: Instruction, lanes: Lanes) -> None:
        registers = _names(instruction.operands[0])
        address = self._address(instruction.operands[1], "u64", lanes)
        values = self._memory.load(address, TYPES[instruction.type], len(registers))
        for register, column in zip(registers, values.T, strict=True):
            self._write(register, lanes, np.ascontiguousarray(column))

    def _store_global(self, instruction: Instruction, lanes: Lanes) -> None:
        registers = _names(instruction.operands[1])
        address = self._address(instruction.operands[0], "u64", lanes)
        columns = [self._read(register, instruction.type, lanes) for register in registers]
        values = np.stack([np.broadcast_to(column, lanes.shape) for column in columns], 1)
        self._memory.store(address, values)

    def _access_shared(self, instruction: Instruction, lanes: Lanes) -> None:
        if TYPES[instruction.type].itemsize != 4 or len(instruction.modifiers) != 2:
            raise NotImplementedError(instruction.text)
        who = self._block[lanes], self._thread[lanes].astype(np.int64)
        if instruction.name == "ld":
            register, operand = instruction.operands
            words = self._shared.load(*who, self._address(operand, "u32", lanes))
            self._write(register, lanes, words)
        else:
            operand, register = instruction.operands
            values = self._read(register, "b32", lanes)
            self._shared.store(*who, self._address(operand, "u32", lanes), values)

    def _pass_shuffles(self) -> bool:
        """Exchange the values of the warps of which every lane waits at one shuffle."""
        at = self._at.reshape(-1, WARP)
        together = (at == at[:, :1]).all(1) & self._waits.reshape(-1, WARP).all(1)
        passed = False
        for index in np.unique(at[together, 0]):
            instruction = self._kernel.instructions[index]
            if instruction.name != "shfl":
                continue
            warps = np.nonzero(together & (at[:, 0] == index))[0]
            lanes = (warps[:, None] * WARP + np.arange(WARP)).ravel()
            target, operand, *how = instruction.operands
            distance, clamp, mask = (self._read(each, "b32", lanes) for each in how)
            if instruction.modifiers[1] != "bfly" or (clamp != WARP - 1).any():
                raise NotImplementedError(instruction.text)
            if (mask != EVERY_LANE).any():
                raise PtxError("a shuffle's mask lacks a lane")
            source = lanes ^ distance.astype(np.intp)
            register, _, predicate = target.partition("|")
            self._write(register, lanes, self._read(operand, "b32", source))
            if predicate:
                self._registers[predicate][lanes] = True
            self._go_on(lanes)
            passed = True
        return passed

    def _pass_barriers(self) -> bool:
        """Let the blocks go on of which every lane waits at one barrier."""
        at = self._at.reshape(-1, self._block_size)
        together = (at == at[:, :1]).all(1) & self._waits.reshape(at.shape).all(1)
        blocks = np.nonzero(together & np.isin(at[:, 0], self._barriers))[0]
        if len(blocks):
            self._shared.pass_barrier(blocks)
            self._go_on(np.nonzero(np.isin(self._block, blocks))[0])
        return len(blocks) > 0

    def _go_on(self, lanes: Lanes) -> None:
        self._at[lanes] += 1
        self._waits[lanes] = False


def _names(operand: str) -> list[str]:
    """Return the registers of an operand in braces, or the one that it is."""
    return operand.strip("{}").replace(",", " ").split()
