"""Exchanges between the lanes of a warp: ``shfl.sync``, ``redux.sync`` and ``vote.sync.ballot``."""

import numpy as np

from kernel_lab.ptx.batch import WARP, Batch
from kernel_lab.ptx.instructions import Instruction
from kernel_lab.ptx.operands import TYPES, UINT32, Array, Mask, Step, destination, reader


def decode(instruction: Instruction) -> Step | None:
    """What an instruction does, or ``None`` where it exchanges nothing."""
    if instruction.family == "shfl":
        return _shuffle(instruction)
    if instruction.family == "redux":
        return _reduce(instruction)
    if instruction.opcode == "vote.sync.ballot.b32":
        return _ballot(instruction)
    return None


def _shuffle(instruction: Instruction) -> Step:
    mode, index = instruction.parts[2], destination(instruction.operands[0])
    value, amount, clamp, members = (reader(operand, UINT32) for operand in instruction.operands[1:5])

    def step(batch: Batch, active: Mask | None) -> None:
        batch.check_members(instruction, active, members(batch))
        source = batch.warp_begin + _source_lane(mode, batch.lane, amount(batch), clamp(batch))
        data = value(batch)
        if data.shape:
            data = data[source]
        if active is not None and (~active[source] & active).any():
            batch.finding("shuffle from an inactive lane", instruction)
        batch.write(index, data, active)

    return step


def _source_lane(mode: str, lane: Array, amount: Array, clamp: Array) -> Array:
    """The lane from which each reads, int64 ``[threads]``: itself where the other lies outside of its segment."""
    by = amount & np.uint32(31)
    segment, limit = (clamp >> np.uint32(8)) & np.uint32(31), clamp & np.uint32(31)
    last = (lane & segment) | (limit & ~segment & np.uint32(31))
    if mode == "up":
        other = lane.astype(np.int64) - by.astype(np.int64)
        return np.where(other >= last.astype(np.int64), other, lane).astype(np.int64)
    places = {"down": lane + by, "bfly": lane ^ by, "idx": (lane & segment) | (by & ~segment)}
    other = places[mode]
    return np.where(other <= last, other, lane).astype(np.int64)


def _reduce(instruction: Instruction) -> Step:
    """The same for all lanes of a warp, which must all take part."""
    operation = {"add": np.add, "min": np.minimum, "max": np.maximum}[instruction.parts[2]]
    dtype = TYPES[instruction.parts[-1]]
    index = destination(instruction.operands[0])
    value, members = reader(instruction.operands[1], dtype), reader(instruction.operands[2], UINT32)

    def step(batch: Batch, active: Mask | None) -> None:
        batch.check_members(instruction, active, members(batch))
        data = np.broadcast_to(value(batch), batch.threads).reshape(-1, WARP)
        batch.write(index, np.repeat(operation.reduce(data, axis=1, dtype=dtype), WARP), active)

    return step


def _ballot(instruction: Instruction) -> Step:
    """A bit of each lane's truth value, in all lanes; lanes that take no part have a 0."""
    index = destination(instruction.operands[0])
    value, members = reader(instruction.operands[1], TYPES["pred"]), reader(instruction.operands[2], UINT32)

    def step(batch: Batch, active: Mask | None) -> None:
        batch.check_members(instruction, active, members(batch))
        votes = np.broadcast_to(value(batch), batch.threads)
        votes = votes if active is None else votes & active
        bits = votes.reshape(-1, WARP) @ (np.uint32(1) << np.arange(WARP, dtype=np.uint32))
        batch.write(index, np.repeat(bits.astype(np.uint32), WARP), active)

    return step
