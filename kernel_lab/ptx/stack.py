"""Loads from and stores to a thread's stack, which Triton's kernels reach through generic addresses."""

import numpy as np

from kernel_lab.ptx.batch import Batch
from kernel_lab.ptx.instructions import STACK, Instruction, Register
from kernel_lab.ptx.operands import KEPT, TYPES, Array, Mask, Step, address_reader, reader


def decode(instruction: Instruction) -> Step | None:
    """What an instruction does, or ``None`` where it is no access by a generic address."""
    if instruction.family not in ("ld", "st") or len(instruction.parts) != 2:
        return None
    return _load(instruction) if instruction.family == "ld" else _store(instruction)


def _load(instruction: Instruction) -> Step:
    register, address = instruction.operands
    assert isinstance(register, Register)
    size, where, kept = TYPES[instruction.parts[-1]].itemsize, address_reader(address), KEPT[register.width]

    def step(batch: Batch, active: Mask | None) -> None:
        threads, bytes_ = _places(batch, instruction, where(batch), active, size)
        data = np.zeros(batch.threads, KEPT[8 * size])
        data[threads] = batch.stack[threads[:, None], bytes_].copy().view(KEPT[8 * size])[:, 0]
        batch.write(register.index, data.astype(kept), active)

    return step


def _store(instruction: Instruction) -> Step:
    address, value = instruction.operands
    size, where = TYPES[instruction.parts[-1]].itemsize, address_reader(address)
    read = reader(value, KEPT[8 * size])

    def step(batch: Batch, active: Mask | None) -> None:
        threads, bytes_ = _places(batch, instruction, where(batch), active, size)
        data = np.broadcast_to(read(batch), batch.threads)[threads]
        batch.stack[threads[:, None], bytes_] = data.reshape(-1, 1).view(np.uint8)

    return step


def _places(batch: Batch, instruction: Instruction, addresses: Array, active: Mask | None, size: int) -> tuple[Array, Array]:
    """The threads ``[n]`` whose accesses lie within their stack, and the bytes of each, ``[n, size]``."""
    threads = batch.selected(active)
    offsets = addresses.astype(np.int64)[threads] - STACK
    outside = (offsets < 0) | (offsets + size > batch.launch.program.stack)
    if outside.any():
        batch.finding("stack access out of bounds", instruction, outside.sum())
        threads, offsets = threads[~outside], offsets[~outside]
    return threads, offsets[:, None] + np.arange(size)
