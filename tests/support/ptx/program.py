"""PTX as nvcc writes it, parsed into instructions."""

import re
from dataclasses import dataclass, field

_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*(?:\.maxntid[^\n]*\s*)?\{(.*?)\n\}", re.S)
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+) (\w+)(?:\[(\d+)\])?")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%\w+?)<(\d+)>;")
_SHARED = re.compile(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\];")
_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([\w.]+)\s*(.*?);$")
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")

SHARED_GAP = 128
"""Nothing is at up to so many bytes after a shared variable, so that overruns are found."""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line; `name` is the opcode's first part, `modifiers` are the others."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str

    @property
    def type(self) -> str:
        """Return the last part of the opcode: f32, u64, ..."""
        return self.modifiers[-1]


@dataclass(kw_only=True)
class Kernel:
    """An entry; its labels are indices of instructions."""

    name: str
    parameters: dict[str, int]
    """Sizes in bytes."""
    registers: dict[str, str] = field(default_factory=dict)
    """The type of each register."""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, range] = field(default_factory=dict)
    """The addresses of each shared variable."""
    executed: set[int] = field(default_factory=set)
    """The instructions that some launch has executed."""


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a module by their mangled names."""
    text = re.sub(r"//[^\n]*", "", text)
    shared: dict[str, range] = {}
    address = 0
    for name, size in _SHARED.findall(text):
        shared[name] = range(address, address + int(size))
        address += int(size) + SHARED_GAP - int(size) % SHARED_GAP
    kernels = {}
    for name, parameters, body in _ENTRY.findall(text):
        kernel = Kernel(
            name=name,
            parameters={
                parameter: int(size or 0) or int(kind[1:]) // 8
                for kind, parameter, size in _PARAMETER.findall(parameters)
            },
            shared=shared,
        )
        for line in body.splitlines():
            _add_line(kernel, line.strip())
        kernels[name] = kernel
    return kernels


def _add_line(kernel: Kernel, line: str) -> None:
    if registers := _REGISTERS.match(line):
        kind, prefix, count = registers.groups()
        kernel.registers |= {f"{prefix}{number}": kind for number in range(int(count))}
    elif line.startswith("$"):
        kernel.labels[line.removesuffix(":")] = len(kernel.instructions)
    elif line and not line.startswith("."):
        negated, predicate, opcode, operands = _parts(line)
        name, *modifiers = opcode.split(".")
        kernel.instructions.append(
            Instruction(
                name=name,
                modifiers=tuple(modifiers),
                operands=tuple(_OPERANDS.findall(operands)),
                predicate=predicate,
                negated=bool(negated),
                text=line,
            )
        )


def _parts(line: str) -> tuple[str, str | None, str, str]:
    match = _INSTRUCTION.match(line)
    if not match:
        raise NotImplementedError(f"PTX that the parser does not know: {line}")
    negated, predicate, opcode, operands = match.groups()
    return negated, predicate, opcode, operands
