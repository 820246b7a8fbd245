"""``wgmma``: products of a warpgroup (four warps), whose factors lie in shared memory and are read while others compute."""

import re
from typing import NamedTuple

import numpy as np

from kernel_lab.ptx.batch import WARP, Batch
from kernel_lab.ptx.instructions import Immediate, Instruction, Operand, Vector
from kernel_lab.ptx.matrices import PAIR, ROW, left_fragment, numbers, registers_of
from kernel_lab.ptx.operands import TYPES, Array, Mask, Step, destination, reader
from kernel_lab.ptx.shared_access import check_races

GROUP = 4 * WARP
CHUNK = 16  # bytes in which what is being read is noted
# Bytes of a row and the bits of an address that are exchanged, by the mode that a descriptor names.
SWIZZLES = {1: (128, 0x70), 2: (64, 0x30), 3: (32, 0x10)}


class _Product(NamedTuple):
    """A factor that is being read: by the group of which this is the first thread, which bytes of the batch's memory."""

    instruction: Instruction
    first: int
    group: int
    chunks: Array


def decode(instruction: Instruction) -> Step | None:
    """What an instruction does, or ``None`` where it is none of these."""
    if instruction.opcode.startswith("wgmma.mma_async"):
        return _multiply(instruction)
    if instruction.opcode.startswith("wgmma.fence"):
        return lambda batch, active: None
    if instruction.opcode.startswith("wgmma.commit_group"):
        return _commit
    if instruction.opcode.startswith("wgmma.wait_group"):
        pending = _number(instruction.operands[0])
        return lambda batch, active: _finish(batch, active, pending)
    return None


def _number(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise NotImplementedError(f"a number that is {operand}")
    return operand.value


def operand_offsets(descriptor: int, rows: int, k: int, item: int, k_major: bool) -> Array:
    """Where the numbers of a factor lie in shared memory: bytes ``[rows, k]``, by the 64 bits of a matrix descriptor.

    Args:
        item: bytes of a number.
        k_major: whether the numbers of a row lie together, rather than those of a column.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("a matrix descriptor with a base offset")
    mode = descriptor >> 62 & 3
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :]
    if mode == 0:
        if not k_major:
            raise NotImplementedError("a factor without swizzle whose columns lie together")
        plain: Array = start + row % 8 * 16 + row // 8 * stride + column * item // 16 * leading + column * item % 16
        return plain
    width, exchanged = SWIZZLES[mode]
    if k_major:
        logical = start + row % 8 * width + row // 8 * stride + column * item
    else:
        logical = start + column % 8 * width + column // 8 * stride + row * item // width * leading + row * item % width
    swizzled: Array = logical ^ (logical >> 3 & exchanged)
    return swizzled


def _factor(
    batch: Batch, instruction: Instruction, register: int, active: Mask, shape: tuple[int, int], kind: str, k_major: bool
) -> Array:
    """A factor in shared memory, ``[groups, *shape]``; zeros for the groups that are not active."""
    item = 4 if kind == "tf32" else 2
    descriptors = batch.registers[register].reshape(-1, GROUP)
    if (descriptors != descriptors[:, :1]).any(1)[active].any():
        batch.finding("threads of a warpgroup have different descriptors", instruction)
    factor = np.zeros((len(descriptors), *shape))
    for group in np.flatnonzero(active):
        offsets = operand_offsets(int(descriptors[group, 0]), *shape, item, k_major)
        last = batch.launch.shared_bytes - item
        if offsets.max() > last:
            batch.finding("shared read out of bounds", instruction, 1, f"{offsets.max()} of {last + item}")
            offsets = np.minimum(offsets, last)
        first = int(group) * GROUP
        flat = offsets + int(batch.slot[first]) * batch.shared.pitch
        factor[group] = numbers(batch.shared.views[item][flat // item], kind)
        chunks = np.unique(flat // CHUNK) * CHUNK
        check_races(batch, instruction, chunks, CHUNK, np.full(len(chunks), first), "read")
        batch.shared.in_flight[chunks[:, None] + np.arange(CHUNK)] += 1
        closed = int(batch.in_flight.product_group[first])
        batch.in_flight.products.append(_Product(instruction, first, closed, chunks))
    return factor


def _multiply(instruction: Instruction) -> Step:
    shape = re.match(r"m(\d+)n(\d+)k(\d+)", instruction.parts[4])
    assert shape is not None
    _, n, k = map(int, shape.groups())
    kind = instruction.parts[6]
    results, left, right, scale, *rest = instruction.operands
    negations, majors = [_number(operand) for operand in rest[:2]], [_number(operand) == 0 for operand in rest[2:]]
    if negations != [1, 1]:
        raise NotImplementedError(instruction.text)
    if kind == "tf32":  # has no choice
        majors = [True, True]
    to, right_register, keep = registers_of(results), destination(right), reader(scale, TYPES["pred"])
    left_registers = registers_of(left) if isinstance(left, Vector) else [destination(left)]

    def step(batch: Batch, active: Mask | None) -> None:
        there = np.ones(batch.threads, bool) if active is None else active
        groups: Mask = np.asarray(there.reshape(-1, GROUP).any(1))
        if (groups != there.reshape(-1, GROUP).all(1)).any():
            batch.finding("wgmma without its whole warpgroup", instruction)
        if isinstance(left, Vector):
            a = left_fragment(batch, left_registers, kind).reshape(-1, 64, k)
        else:
            a = _factor(batch, instruction, left_registers[0], groups, (64, k), kind, majors[0])
        b = _factor(batch, instruction, right_register, groups, (n, k), kind, majors[-1])
        product = (a @ b.transpose(0, 2, 1)).reshape(-1, 16, n)  # by warp
        kept = np.broadcast_to(keep(batch), batch.threads)
        for j, register in enumerate(to):
            value = product[:, ROW + 8 * (j >> 1 & 1), 8 * (j >> 2) + 2 * PAIR + (j & 1)].reshape(-1)
            value = value + np.where(kept, batch.registers[register].view(np.float32), 0.0)
            batch.write(register, value.astype(np.float32), active)
        _mark(batch, batch.in_flight.results, to, there)
        if isinstance(left, Vector):
            _mark(batch, batch.in_flight.sources, left_registers, there)

    return step


def _mark(batch: Batch, registers: dict[int, Array], marked: list[int], threads: Mask) -> None:
    """These registers of these threads belong to a product until it is waited for."""
    for register in marked:
        before = registers.get(register, np.full(batch.threads, -1, np.int32))
        registers[register] = np.where(threads, batch.in_flight.product_group, before)


def check_registers(batch: Batch, instruction: Instruction, active: Mask | None) -> None:
    """What products write may not be touched before they are waited for, what they read may not be changed."""
    flying = batch.in_flight
    if instruction.family == "wgmma":  # one product may go on with the results of another
        return
    for marked, touched in ((flying.results, instruction.touched), (flying.sources, instruction.written)):
        for register in touched & marked.keys():
            early = marked[register] >= 0 if active is None else (marked[register] >= 0) & active
            if early.any():
                batch.finding("register of a wgmma in flight", instruction, early.sum())


def _commit(batch: Batch, active: Mask | None) -> None:
    batch.in_flight.product_group = batch.in_flight.product_group + (1 if active is None else active)


def _finish(batch: Batch, active: Mask | None, pending: int) -> None:
    """The factors of all but the last ``pending`` groups have been read, as late as now."""
    remaining = []
    for product in batch.in_flight.products:
        instruction, first, group, chunks = product
        if group < batch.in_flight.product_group[first] - pending and (active is None or active[first]):
            check_races(batch, instruction, chunks, CHUNK, np.full(len(chunks), first), "read")
            batch.shared.in_flight[chunks[:, None] + np.arange(CHUNK)] -= 1
        else:
            remaining.append(product)
    batch.in_flight.products = remaining
    done = batch.in_flight.product_group - pending
    for registers in (batch.in_flight.results, batch.in_flight.sources):
        for register, groups in list(registers.items()):
            finished = groups < done if active is None else (groups < done) & active
            registers[register] = np.where(finished, -1, groups)
            if (registers[register] < 0).all():
                del registers[register]
