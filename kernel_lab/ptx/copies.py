"""``cp.async``: copies from global into shared memory that are there when they are waited for, and not before."""

from typing import NamedTuple

import numpy as np

from kernel_lab.ptx.batch import Batch
from kernel_lab.ptx.global_access import read_checked, touched
from kernel_lab.ptx.instructions import Immediate, Instruction
from kernel_lab.ptx.operands import KEPT, UINT32, Array, Mask, Read, Step, address_reader, reader
from kernel_lab.ptx.shared_access import inside, store_inside
from kernel_lab.ptx.shared_memory import POISON


class _Copy(NamedTuple):
    """What threads ``[n]`` copy: in which group of theirs, to where in the batch's memory, which numbers ``[n, count]``."""

    instruction: Instruction
    threads: Array
    group: Array
    flat: Array
    data: Array

    def of(self, which: Mask) -> "_Copy":
        return _Copy(self.instruction, *(part[which] for part in self[1:]))


def decode(instruction: Instruction) -> Step | None:
    """What an instruction does, or ``None`` where it is none of these."""
    if instruction.opcode.startswith("cp.async.c") and "shared" in instruction.parts:
        return _copy(instruction)
    if instruction.opcode == "cp.async.commit_group":
        return _commit
    if instruction.opcode.startswith("cp.async.wait_group"):
        (pending,) = instruction.operands
        assert isinstance(pending, Immediate)
        left = pending.value
        return lambda batch, active: _finish(batch, active, left)
    return None


def _copy(instruction: Instruction) -> Step:
    to, from_, whole, *rest = instruction.operands
    assert isinstance(whole, Immediate)
    size = whole.value
    item = min(size, 8)
    target, source = address_reader(to), address_reader(from_)
    everything = np.array(size, UINT32)
    length: Read = reader(rest[0], UINT32) if rest else lambda batch: everything

    def step(batch: Batch, active: Mask | None) -> None:
        lengths = np.broadcast_to(length(batch), batch.threads)
        wanted = lengths != 0 if active is None else active & (lengths != 0)
        if (lengths[wanted] != size).any():
            raise NotImplementedError("a copy of part of its size")
        addresses = source(batch)
        data = np.zeros((batch.threads, size // item), KEPT[8 * item])  # zeros where nothing is read
        batch.counts.count_sectors(instruction, "load", addresses, wanted, size)
        for allocation, threads, offsets in touched(batch, instruction, addresses, wanted, size, writing=False):
            data[threads] = read_checked(batch, instruction, allocation, threads, offsets, item, size // item)
        threads, flat = inside(batch, instruction, target(batch), active, size, "write")
        if len(threads):  # until they are waited for there is poison
            store_inside(batch, instruction, flat, threads, np.full_like(data[threads], POISON * (2 ** (8 * item) // 255)))
            np.add.at(batch.shared.arriving, flat[:, None] + np.arange(size), 1)
            group = batch.in_flight.copy_group[threads]
            batch.in_flight.copies.append(_Copy(instruction, threads, group, flat, data[threads]))

    return step


def _commit(batch: Batch, active: Mask | None) -> None:
    batch.in_flight.copy_group = batch.in_flight.copy_group + (1 if active is None else active)


def _finish(batch: Batch, active: Mask | None, pending: int) -> None:
    """All but the last ``pending`` groups of the active threads are there."""
    remaining = []
    for copy in batch.in_flight.copies:
        done = copy.group < batch.in_flight.copy_group[copy.threads] - pending
        if active is not None:
            done &= active[copy.threads]
        if done.any():
            finished = copy.of(done)
            size = finished.data.shape[1] * finished.data.itemsize
            np.subtract.at(batch.shared.arriving, finished.flat[:, None] + np.arange(size), 1)
            store_inside(batch, copy.instruction, finished.flat, finished.threads, finished.data)
        if not done.all():
            remaining.append(copy.of(~done))
    batch.in_flight.copies = remaining
