"""``ldmatrix``, ``stmatrix`` and ``mma``: matrices whose numbers are spread over the lanes of a warp.

Products are exact and summed in float64, then rounded once: a tensor core loses a little more.
"""

import numpy as np

from kernel_lab.ptx.batch import WARP, Batch
from kernel_lab.ptx.instructions import Instruction, Operand, Vector
from kernel_lab.ptx.operands import KEPT, TYPES, Array, Mask, Step, address_reader, destination, reader
from kernel_lab.ptx.shared_access import reached, store_checked

_LANE = np.arange(WARP)
ROW, PAIR = _LANE // 4, _LANE % 4  # of a fragment of 8 x 8 numbers: the row of a lane, and which two numbers of it
ALL_LANES = np.array(0xFFFFFFFF, KEPT[32])
SUPPORTED = {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")}


def decode(instruction: Instruction) -> Step | None:
    """What an instruction does, or ``None`` where it is none of these."""
    if instruction.family == "ldmatrix":
        return _load_matrices(instruction)
    if instruction.family == "stmatrix":
        return _store_matrices(instruction)
    if instruction.family == "mma":
        return _multiply(instruction)
    return None


def registers_of(operand: Operand) -> list[int]:
    """The registers of a vector, by their numbers."""
    if not isinstance(operand, Vector):
        raise NotImplementedError(f"a fragment that is {operand}")
    return [destination(part) for part in operand.parts]


def _check_form(instruction: Instruction) -> None:
    if "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
        raise NotImplementedError(instruction.text)


def _addressing(batch: Batch, active: Mask | None, count: int) -> Mask:
    """The lanes whose addresses count: eight rows for each of ``count`` matrices."""
    lanes: Mask = batch.lane < 8 * count
    return lanes if active is None else lanes & active


def _load_matrices(instruction: Instruction) -> Step:
    """Each lane gets two numbers of 16 bits of every matrix ``[8, 8]``."""
    _check_form(instruction)
    registers, where = registers_of(instruction.operands[0]), address_reader(instruction.operands[1])
    transposed = "trans" in instruction.parts

    def step(batch: Batch, active: Mask | None) -> None:
        batch.check_members(instruction, active, ALL_LANES)
        addressing, offsets = _addressing(batch, active, len(registers)), where(batch)
        batch.counts.count_banks(instruction, offsets, addressing, 16)
        rows = np.full((batch.threads, 8), 0xFFFF, KEPT[16])
        for threads, flat in reached(batch, instruction, offsets, addressing, 16, "read"):
            rows[threads] = batch.shared.views[2][(flat // 2)[:, None] + np.arange(8)]
        matrices = rows.reshape(-1, 4, 8, 8).astype(KEPT[32])  # [warps, matrix, row, column]
        for i, register in enumerate(registers):
            matrix = matrices[:, i].transpose(0, 2, 1) if transposed else matrices[:, i]
            low, high = matrix[:, ROW, 2 * PAIR], matrix[:, ROW, 2 * PAIR + 1]
            batch.write(register, (low | high << np.uint32(16)).reshape(-1), active)

    return step


def _store_matrices(instruction: Instruction) -> Step:
    _check_form(instruction)
    where, registers = address_reader(instruction.operands[0]), registers_of(instruction.operands[1])
    transposed = "trans" in instruction.parts

    def step(batch: Batch, active: Mask | None) -> None:
        batch.check_members(instruction, active, ALL_LANES)
        addressing, offsets = _addressing(batch, active, len(registers)), where(batch)
        batch.counts.count_banks(instruction, offsets, addressing, 16)
        matrices = np.zeros((batch.threads // WARP, 4, 8, 8), KEPT[16])
        for i, register in enumerate(registers):
            value = batch.registers[register].reshape(-1, WARP)
            matrix = matrices[:, i].transpose(0, 2, 1) if transposed else matrices[:, i]
            matrix[:, ROW, 2 * PAIR] = value & np.uint32(0xFFFF)
            matrix[:, ROW, 2 * PAIR + 1] = value >> np.uint32(16)
        store_checked(batch, instruction, offsets, addressing, matrices.reshape(-1, 8))

    return step


def numbers(bits: Array, kind: str) -> Array:
    """float64 of the bits: uint16 of ``"f16"`` or ``"bf16"``, uint32 of ``"tf32"``."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return (bits.astype(KEPT[32]) << np.uint32(16)).view(np.float32).astype(np.float64)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def _halves(batch: Batch, register: int, kind: str) -> Array:
    """The two numbers of 16 bits that each lane has in a register, ``[warps, lanes, 2]``."""
    return numbers(batch.registers[register].reshape(-1, WARP, 1).view(KEPT[16]), kind)


def left_fragment(batch: Batch, registers: list[int], kind: str) -> Array:
    """The left factor ``[warps, 16, k]`` from its four registers."""
    if kind == "tf32":
        a = np.empty((batch.threads // WARP, 16, 8))
        for i, register in enumerate(registers):
            a[:, ROW + 8 * (i & 1), PAIR + 4 * (i >> 1)] = numbers(batch.registers[register].reshape(-1, WARP), kind)
        return a
    a = np.empty((batch.threads // WARP, 16, 16))
    for i, register in enumerate(registers):
        halves = _halves(batch, register, kind)
        for j in (0, 1):
            a[:, ROW + 8 * (i & 1), 2 * PAIR + j + 8 * (i >> 1)] = halves[:, :, j]
    return a


def _right_fragment(batch: Batch, registers: list[int], kind: str) -> Array:
    """The right factor ``[warps, k, 8]`` from its two registers."""
    b = np.empty((batch.threads // WARP, 8 if kind == "tf32" else 16, 8))
    for i, register in enumerate(registers):
        if kind == "tf32":
            b[:, PAIR + 4 * i, ROW] = numbers(batch.registers[register].reshape(-1, WARP), kind)
            continue
        halves = _halves(batch, register, kind)
        for j in (0, 1):
            b[:, 2 * PAIR + j + 8 * i, ROW] = halves[:, :, j]
    return b


def _multiply(instruction: Instruction) -> Step:
    shape, kind = instruction.parts[3], instruction.parts[7]
    if (shape, kind) not in SUPPORTED or instruction.parts[6] != "f32":
        raise NotImplementedError(instruction.text)
    results, left, right = (registers_of(operand) for operand in instruction.operands[:3])
    added = instruction.operands[3]
    assert isinstance(added, Vector)
    addends = [reader(part, TYPES["f32"]) for part in added.parts]

    def step(batch: Batch, active: Mask | None) -> None:
        batch.check_members(instruction, active, ALL_LANES)
        product = left_fragment(batch, left, kind) @ _right_fragment(batch, right, kind)  # [warps, 16, 8]
        values = [np.broadcast_to(addend(batch), batch.threads).reshape(-1, WARP) for addend in addends]
        for i, register in enumerate(results):
            value = product[:, ROW + 8 * (i >> 1), 2 * PAIR + (i & 1)] + values[i]
            batch.write(register, value.astype(np.float32).reshape(-1), active)

    return step
