"""Moves between registers: copies, parameters, conversions of types, and bytes in another order."""

import numpy as np

from kernel_lab.ptx.batch import Batch
from kernel_lab.ptx.instructions import Address, Instruction, Register, Vector
from kernel_lab.ptx.operands import KEPT, TYPES, UINT32, Array, DType, Mask, Step, bits_of, destination, reader, writes


def decode(instruction: Instruction) -> Step | None:
    """What an instruction does, or ``None`` where it is no move."""
    family = instruction.family
    if family == "mov" or instruction.opcode == "cvta.local.u64":
        return _move(instruction, TYPES[instruction.parts[-1]])
    if family == "ld" and instruction.parts[1] == "param":
        return _parameter(instruction, TYPES[instruction.parts[-1]])
    if family == "cvt":
        return _convert(instruction)
    if family == "prmt":
        return _permute(instruction)
    return None


def _move(instruction: Instruction, dtype: DType) -> Step:
    to, what = instruction.operands
    if isinstance(to, Vector):
        return _unpack(to, instruction, dtype)
    if isinstance(what, Vector):
        return _pack(what, instruction, dtype)
    return writes(to, reader(what, dtype))


def _unpack(to: Vector, instruction: Instruction, dtype: DType) -> Step:
    """The parts of a register into registers of their own, the low one first."""
    read, narrow = reader(instruction.operands[1], bits_of(dtype)), KEPT[8 * dtype.itemsize // len(to.parts)]
    places = [(part.index, i * 8 * narrow.itemsize) for i, part in enumerate(to.parts) if isinstance(part, Register)]

    def step(batch: Batch, active: Mask | None) -> None:
        value = read(batch)
        for index, shift in places:
            batch.write(index, (value >> value.dtype.type(shift)).astype(narrow), active)

    return step


def _pack(what: Vector, instruction: Instruction, dtype: DType) -> Step:
    wide, bits = bits_of(dtype), 8 * dtype.itemsize // len(what.parts)
    reads = [reader(part, KEPT[bits]) for part in what.parts]

    def packed(batch: Batch) -> Array:
        value = np.zeros((), wide)
        for i, read in enumerate(reads):
            value = value | (read(batch).astype(wide) << wide.type(i * bits))
        return value

    return writes(instruction.operands[0], packed)


def _parameter(instruction: Instruction, dtype: DType) -> Step:
    to, address = instruction.operands
    assert isinstance(to, Register)
    assert isinstance(address, Address)
    name, kept, extended = str(address.base), KEPT[to.width], np.dtype(f"{dtype.kind}{to.width // 8}")

    def argument(batch: Batch) -> Array:
        bits = np.array(batch.launch.arguments[name] & (2**64 - 1), np.uint64)
        return bits.astype(bits_of(dtype)).view(dtype).astype(extended).view(kept)

    return writes(to, argument)


def _convert(instruction: Instruction) -> Step:
    to, from_ = instruction.parts[-2], instruction.parts[-1]
    if to == "tf32":
        return _round_to_tf32(instruction)
    if (to, from_) in (("f16x2", "f32"), ("bf16x2", "f32")):
        return _convert_pairs(instruction)
    if to not in TYPES or from_ not in TYPES:
        raise NotImplementedError(instruction.text)
    result, operand = instruction.operands
    a, dtype = reader(operand, TYPES[from_]), TYPES[to]
    if dtype.kind == "f":
        narrows = TYPES[from_].kind == "f" and dtype.itemsize < TYPES[from_].itemsize
        if narrows and "rn" not in instruction.parts:
            raise NotImplementedError(instruction.text)
        return writes(result, lambda batch: a(batch).astype(dtype))
    if not isinstance(result, Register):
        raise NotImplementedError(instruction.text)
    if TYPES[from_].kind == "f":
        if "rzi" not in instruction.parts or to != "s32" or result.width != 32:
            raise NotImplementedError(instruction.text)
        return writes(result, lambda batch: _towards_zero(a(batch)).view(KEPT[32]))
    kept, extended = KEPT[result.width], np.dtype(f"{dtype.kind}{result.width // 8}")
    return writes(result, lambda batch: a(batch).astype(dtype).astype(extended).view(kept))


def _towards_zero(value: Array) -> Array:
    """As int32: what is beyond it becomes its end, and NaN zero."""
    ends = np.clip(np.where(np.isnan(value), 0.0, value).astype(np.float64), -(2.0**31), 2.0**31 - 1)
    return np.trunc(ends).astype(np.int32)


def _convert_pairs(instruction: Instruction) -> Step:
    """Two float32, the upper one first, to two numbers of 16 bits in one register."""
    to, *parts = instruction.operands
    if "rn" not in instruction.parts or "relu" in instruction.parts:
        raise NotImplementedError(instruction.text)
    high, low = (reader(part, TYPES["f32"]) for part in parts)
    rounded = _half_bits if instruction.parts[-2] == "f16x2" else _bfloat16_bits
    return writes(to, lambda batch: rounded(high(batch)) << np.uint32(16) | rounded(low(batch)))


def _half_bits(value: Array) -> Array:
    return value.astype(np.float16).view(np.uint16).astype(np.uint32)


def _bfloat16_bits(value: Array) -> Array:
    """To nearest, ties to even; every NaN becomes the same one."""
    bits = value.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded)


def _round_to_tf32(instruction: Instruction) -> Step:
    """float32 to its upper 19 bits, to nearest, ties away from zero."""
    read = reader(instruction.operands[1], UINT32)

    def rounded(batch: Batch) -> Array:
        bits = read(batch)
        finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
        return np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)

    return writes(instruction.operands[0], rounded)


def _permute(instruction: Instruction) -> Step:
    """Four bytes out of eight, each by four bits of the selector, whose highest spreads the byte's sign."""
    a, b, chosen = (reader(operand, UINT32) for operand in instruction.operands[1:])
    index = destination(instruction.operands[0])

    def step(batch: Batch, active: Mask | None) -> None:
        both = a(batch).astype(np.uint64) | (b(batch).astype(np.uint64) << np.uint64(32))
        selector, value = chosen(batch), np.zeros((), UINT32)
        for i in range(4):
            which = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((which & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
            signs = np.where(byte & np.uint64(0x80), 0xFF, 0)
            byte = np.where(which & np.uint32(8), signs, byte).astype(np.uint32)
            value = value | (byte << np.uint32(8 * i))
        batch.write(index, value, active)

    return step
