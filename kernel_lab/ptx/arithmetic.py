"""Arithmetic, comparison and logic, thread by thread."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kernel_lab.ptx.instructions import Immediate, Instruction
from kernel_lab.ptx.operands import TYPES, UINT32, Array, DType, Read, Step, bits_of, reader, writes

Operation = Callable[..., Any]


def _divide(a: Array, b: Array) -> Array:
    """Towards zero, as C does."""
    quotient: Array = a // b
    if quotient.dtype.kind == "i":
        quotient = quotient + ((a - quotient * b != 0) & ((a < 0) != (b < 0)))
    return quotient


def _least_float(a: Array, b: Array) -> Array:
    """NaN only of two of them, and of two zeros the negative one."""
    bits = bits_of(a.dtype)
    return np.where(a == b, (a.view(bits) | b.view(bits)).view(a.dtype), np.fmin(a, b))


def _largest_float(a: Array, b: Array) -> Array:
    bits = bits_of(a.dtype)
    return np.where(a == b, (a.view(bits) & b.view(bits)).view(a.dtype), np.fmax(a, b))


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Of float32, rounded once: the exact product and ``c`` are added and rounded to odd in float64, then to float32."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + addend)
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = total.view(np.int64) & 1 == 0
    inexact = np.isfinite(total) & np.isfinite(error) & (error != 0) & even
    if inexact.any():
        total = np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32)


def _fused_multiply_add_64(a: Array, b: Array, c: Array) -> Array:
    wide = np.longdouble  # 11 bits more than float64, not all of the product's
    exact: Array = a.astype(wide) * b.astype(wide) + c.astype(wide)
    return exact.astype(np.float64)


def _ordered_unequal(a: Array, b: Array) -> Array:
    return (a < b) | (a > b)


BINARY: dict[str, Operation] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
}
UNARY: dict[str, Operation] = {"neg": np.negative, "not": np.invert, "sqrt": np.sqrt, "abs": np.abs}
# Those that end in u are true of NaN.
COMPARISONS: dict[str, Operation] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, b: ~_ordered_unequal(a, b),
    "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


def decode(instruction: Instruction) -> Step | None:
    """What an instruction does, or ``None`` where it is no arithmetic."""
    family, operands, parts = instruction.family, instruction.operands, instruction.parts
    dtype = TYPES.get(parts[-1])
    if dtype is None:
        return _absolute_pairs(instruction) if (family, parts[-1]) == ("abs", "f16x2") else None
    if family == "selp":
        a, b, predicate = reader(operands[1], dtype), reader(operands[2], dtype), reader(operands[3], TYPES["pred"])
        return writes(operands[0], lambda batch: np.where(predicate(batch), a(batch), b(batch)))
    if family == "setp":
        return _comparison(instruction, dtype)
    if family in ("shl", "shr"):
        return _shift(instruction, dtype)
    if family in ("mul", "mad", "fma"):
        return _product(instruction, dtype)
    if family == "bfe":
        return _bit_field(instruction, dtype)
    if family == "popc":
        a = reader(operands[1], dtype)
        return writes(operands[0], lambda batch: np.bitwise_count(a(batch)).astype(np.uint32))
    if family == "div" and dtype.kind == "f":
        return _binary(instruction, np.true_divide, dtype)
    if family in ("min", "max") and dtype.kind == "f":
        if len(instruction.parts) != 2 or len(instruction.operands) != 3:  # of NaN, or of three, they have other rules
            raise NotImplementedError(instruction.text)
        return _binary(instruction, _least_float if family == "min" else _largest_float, dtype)
    if family in BINARY:
        return _binary(instruction, BINARY[family], dtype)
    if family in UNARY:
        return _unary(operands[0], reader(operands[1], dtype), np.logical_not if dtype.kind == "b" else UNARY[family])
    return None


def _unary(to: Any, a: Read, operation: Operation) -> Step:
    return writes(to, lambda batch: operation(a(batch)))


def _binary(instruction: Instruction, operation: Operation, dtype: DType) -> Step:
    a, b = (reader(operand, dtype) for operand in instruction.operands[1:])
    return writes(instruction.operands[0], lambda batch: operation(a(batch), b(batch)))


def _comparison(instruction: Instruction, dtype: DType) -> Step:
    if len(instruction.parts) != 3:  # it would be combined with another predicate
        raise NotImplementedError(instruction.text)
    name = instruction.parts[1]
    compare = _ordered_unequal if dtype.kind == "f" and name == "ne" else COMPARISONS[name]  # NaN is not "unequal" in PTX
    a, b = (reader(operand, dtype) for operand in instruction.operands[1:])
    return writes(instruction.operands[0], lambda batch: np.asarray(compare(a(batch), b(batch)), bool))


def _shift(instruction: Instruction, dtype: DType) -> Step:
    """Bits that are shifted by as many as there are, or more, are gone; of signed numbers the sign is left."""
    bits, zero = 8 * dtype.itemsize, dtype.type(0)
    a, by = reader(instruction.operands[1], dtype), reader(instruction.operands[2], UINT32)

    def left(value: Array, n: Array) -> Array:
        shifted: Array = np.left_shift(value, np.minimum(n, bits - 1).astype(dtype))
        return np.where(n < bits, shifted, zero)

    def right(value: Array, n: Array) -> Array:
        shifted: Array = np.right_shift(value, np.minimum(n, bits - 1).astype(dtype))
        return shifted if dtype.kind == "i" else np.where(n < bits, shifted, zero)

    operation: Operation = left if instruction.family == "shl" else right
    return writes(instruction.operands[0], lambda batch: operation(a(batch), by(batch)))


def _product(instruction: Instruction, dtype: DType) -> Step:
    to, *operands = instruction.operands
    a, b = reader(operands[0], dtype), reader(operands[1], dtype)
    if dtype.kind == "f":
        if instruction.family == "mul":
            return writes(to, lambda batch: a(batch) * b(batch))
        c, fused = reader(operands[2], dtype), fused_multiply_add if dtype == np.float32 else _fused_multiply_add_64
        return writes(to, lambda batch: fused(a(batch), b(batch), c(batch)))
    if instruction.parts[1] not in ("lo", "wide"):
        raise NotImplementedError(instruction.text)
    wide = np.dtype(f"{dtype.kind}{dtype.itemsize * 2}") if instruction.parts[1] == "wide" else dtype
    if instruction.family == "mul":
        return writes(to, lambda batch: a(batch).astype(wide) * b(batch).astype(wide))
    c = reader(operands[2], wide)
    return writes(to, lambda batch: a(batch).astype(wide) * b(batch).astype(wide) + c(batch))


def _bit_field(instruction: Instruction, dtype: DType) -> Step:
    """``length`` bits from ``start`` on, with their sign where the type has one."""
    start, length = instruction.operands[2:]
    if not isinstance(start, Immediate) or not isinstance(length, Immediate):
        raise NotImplementedError(instruction.text)
    a, bits = reader(instruction.operands[1], dtype), 8 * dtype.itemsize
    up, down = dtype.type(bits - start.value - length.value), dtype.type(bits - length.value)
    return writes(instruction.operands[0], lambda batch: ((a(batch) << up) >> down).view(bits_of(dtype)))


def _absolute_pairs(instruction: Instruction) -> Step:
    """Of two float16 in one register."""
    a = reader(instruction.operands[1], UINT32)
    return writes(instruction.operands[0], lambda batch: a(batch) & np.uint32(0x7FFF7FFF))
