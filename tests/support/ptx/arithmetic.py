"""What PTX's opcodes compute, on arrays with an element for each lane."""

import operator
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from support.ptx.program import Instruction

Array = NDArray[np.generic]

TYPES = {
    kind + bits: np.dtype(f"{code}{int(bits) // 8}")
    for kind, code in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in ("8", "16", "32", "64")
} | {"f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}

SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
EX2_ERROR = 2.0**-22
"""The relative error that PTX allows ex2.approx."""


def source_types(instruction: Instruction) -> list[str]:
    """Return the type in which each source operand is read."""
    kind = instruction.type
    match instruction.name:
        case "shl" | "shr":
            return [kind, "u32"]
        case "selp":
            return [kind, kind, "pred"]
        case "cvt" if "bf16x2" in instruction.modifiers:
            return ["f32", "f32"]
    return [kind] * (len(instruction.operands) - 1)


def evaluate(instruction: Instruction, sources: list[Array]) -> Array:
    """Return what an instruction computes of its sources."""
    compute = _OPERATIONS.get(instruction.name)
    if compute is None:
        raise NotImplementedError(instruction.text)
    return compute(instruction, *sources)


def _round_to(modifiers: tuple[str, ...], exact: Array) -> Array:
    """Return fp64 as fp32, to the nearest one or, with rm, to the one below."""
    rounded = exact.astype(np.float32)
    if "rm" in modifiers:
        below = np.nextafter(rounded, np.float32(-np.inf))
        return np.where(rounded.astype(np.float64) > exact, below, rounded)
    return rounded


def _flush(values: Array) -> Array:
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def _plain(function: Callable[..., Array]) -> Callable[..., Array]:
    def compute(_: Instruction, *sources: Array) -> Array:
        return function(*sources)

    return compute


def _mul(instruction: Instruction, a: Array, b: Array) -> Array:
    if "wide" in instruction.modifiers:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return a.astype(wide) * b.astype(wide)
    if "hi" in instruction.modifiers:
        raise NotImplementedError(instruction.text)
    return a * b


def _mad(instruction: Instruction, a: Array, b: Array, c: Array) -> Array:
    if "lo" not in instruction.modifiers:
        raise NotImplementedError(instruction.text)
    return a * b + c


def _fma(instruction: Instruction, a: Array, b: Array, c: Array) -> Array:
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    return _round_to(instruction.modifiers, exact)


def _div(instruction: Instruction, a: Array, b: Array) -> Array:
    if instruction.type != "f32":
        raise NotImplementedError(instruction.text)
    return a / b


def _rcp(_: Instruction, a: Array) -> Array:
    return np.float32(1) / a


def _ex2(instruction: Instruction, a: Array) -> Array:
    flush = _flush if "ftz" in instruction.modifiers else np.asarray
    return flush(np.exp2(flush(a).astype(np.float64)).astype(np.float32))


def _shift(function: Callable[..., Array]) -> Callable[..., Array]:
    """Shifts by the width or more leave zeros, or copies of the sign."""

    def compute(_: Instruction, a: Array, amount: Array) -> Array:
        width = 8 * a.dtype.itemsize
        shifted = function(a, np.minimum(amount, width - 1).astype(a.dtype))
        keeps_sign = function is operator.rshift and a.dtype.kind == "i"
        return shifted if keeps_sign else np.where(amount >= width, 0, shifted).astype(a.dtype)

    return compute


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def _setp(instruction: Instruction, a: Array, b: Array) -> Array:
    """Comparisons with a NaN hold if their name ends in u, and only then."""
    comparison, *rest = instruction.modifiers
    name = comparison.removesuffix("u")
    if len(rest) != 1 or (name not in _COMPARISONS and name not in ("nan", "num")):
        raise NotImplementedError(instruction.text)
    if a.dtype.kind != "f":
        return _COMPARISONS[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("nan", "num"):
        return unordered == (name == "nan")
    held = _COMPARISONS[name](a, b)
    return held | unordered if name != comparison else held & ~unordered


def _bf16(values: Array) -> Array:
    bits = np.asarray(values).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint32)


def _cvt(instruction: Instruction, a: Array, low: Array | None = None) -> Array:
    *modifiers, target, source = instruction.modifiers
    if target == "bf16x2" and low is not None:
        if modifiers != ["rn"]:
            raise NotImplementedError(instruction.text)
        return _bf16(a) << np.uint32(16) | _bf16(low)
    if source == "f32" and target == "f32":
        if modifiers == ["sat"]:
            return np.clip(np.where(np.isnan(a), 0, a), 0, 1).astype(np.float32)
        if modifiers == ["rni"]:
            return np.rint(a)
        raise NotImplementedError(instruction.text)
    if source == "f32":
        raise NotImplementedError(instruction.text)
    return a.astype(TYPES[target])


_OPERATIONS: dict[str, Callable[..., Array]] = {
    "mov": _plain(np.asarray),
    "cvta": _plain(np.asarray),
    "add": _plain(operator.add),
    "sub": _plain(operator.sub),
    "and": _plain(operator.and_),
    "or": _plain(operator.or_),
    "xor": _plain(operator.xor),
    "not": _plain(operator.invert),
    "neg": _plain(operator.neg),
    "abs": _plain(np.abs),
    "min": _plain(lambda a, b: np.fmin(a, b)),
    "max": _plain(lambda a, b: np.fmax(a, b)),
    "copysign": _plain(lambda sign, size: np.copysign(size, sign)),
    "selp": _plain(lambda a, b, choice: np.where(choice, a, b)),
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    "div": _div,
    "rcp": _rcp,
    "ex2": _ex2,
    "shl": _shift(operator.lshift),
    "shr": _shift(operator.rshift),
    "setp": _setp,
    "cvt": _cvt,
}
