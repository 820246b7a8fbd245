"""Operands as functions: what an instruction reads, of all threads of a batch at once."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernel_lab.ptx.instructions import Address, Immediate, Operand, Register, Special

if TYPE_CHECKING:
    from kernel_lab.ptx.batch import Batch

Array: TypeAlias = NDArray[Any]
Mask: TypeAlias = NDArray[np.bool_]
DType: TypeAlias = np.dtype[Any]
# One number for each thread, ``[threads]``, or ``[]`` where all have the same.
Read: TypeAlias = Callable[["Batch"], Array]
# What an instruction does to the threads that are active, ``[threads]``, or to all of them (``None``).
Step: TypeAlias = Callable[["Batch", Mask | None], None]

TYPES: dict[str, DType] = {
    f"{kind}{width}": np.dtype(f"{'i' if kind == 's' else 'u'}{width // 8}") for kind in "usb" for width in (8, 16, 32, 64)
}
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
# How registers are kept, by their width in bits.
KEPT: dict[int, DType] = {
    1: np.dtype(bool),
    8: np.dtype("u1"),
    16: np.dtype("u2"),
    32: np.dtype("u4"),
    64: np.dtype("u8"),
}
UINT32 = KEPT[32]


def bits_of(dtype: DType) -> DType:
    """Unsigned integers as wide as that."""
    return KEPT[8 * dtype.itemsize]


def constant(bits: int, dtype: DType) -> Array:
    """A number whose bits are given, ``[]``."""
    if dtype.kind == "b":
        return np.array(bits != 0)
    return np.array(bits & (2 ** (8 * dtype.itemsize) - 1), bits_of(dtype)).view(dtype)


def reader(operand: Operand, dtype: DType) -> Read:
    """An operand as numbers of a type: of the low bits where its register is wider."""
    if isinstance(operand, Immediate):
        value = constant(operand.value, dtype)
        return lambda batch: value
    if isinstance(operand, Special):
        name = operand.name
        return lambda batch: batch.special[name]
    if not isinstance(operand, Register):
        raise NotImplementedError(f"an operand to read that is {operand}")
    index, width = operand.index, operand.width
    if dtype.kind == "b" or KEPT[width] == dtype:
        return lambda batch: batch.registers[index]
    if width == 8 * dtype.itemsize:
        return lambda batch: batch.registers[index].view(dtype)
    narrow = bits_of(dtype)
    return lambda batch: batch.registers[index].astype(narrow).view(dtype)


def address_reader(operand: Operand) -> Read:
    """An address in global memory as uint64, one in shared memory as int64: ``[threads]``."""
    if not isinstance(operand, Address) or isinstance(operand.base, str):
        raise NotImplementedError(f"an address that is {operand}")
    offset = operand.offset
    if operand.base is None:
        return lambda batch: np.full(batch.threads, offset, np.int64)
    index = operand.base.index
    if operand.base.width == 32:
        return lambda batch: batch.registers[index].astype(np.int64) + offset
    if offset == 0:
        return lambda batch: batch.registers[index]
    added = np.uint64(offset & (2**64 - 1))
    return lambda batch: batch.registers[index] + added


def destination(operand: Operand) -> int:
    """The number of the register that is written."""
    if not isinstance(operand, Register):
        raise NotImplementedError(f"a destination that is {operand}")
    return operand.index


def writes(operand: Operand, value: Read) -> Step:
    """The instruction that computes a value and keeps it."""
    index = destination(operand)
    return lambda batch, active: batch.write(index, value(batch), active)
