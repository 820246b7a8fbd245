"""``ld.global``, ``st.global`` and ``atom.global``: every access belongs to an allocation, and no two programs collide."""

from collections.abc import Iterator

import numpy as np

from kernel_lab.ptx.allocations import SECTOR, Accesses, Allocation
from kernel_lab.ptx.batch import Batch
from kernel_lab.ptx.instructions import Instruction, Register, Vector
from kernel_lab.ptx.operands import KEPT, TYPES, Array, Mask, Step, address_reader, bits_of, reader


def decode(instruction: Instruction) -> Step | None:
    """What an instruction does, or ``None`` where it does not touch global memory."""
    families = {"ld": _load, "st": _store, "atom": _atomic, "red": _atomic}
    if "global" not in instruction.parts or instruction.family not in families:
        return None
    return families[instruction.family](instruction)


def _load(instruction: Instruction) -> Step:
    to, address = instruction.operands
    registers = to.parts if isinstance(to, Vector) else (to,)
    item = TYPES[instruction.parts[-1]].itemsize
    size, where = item * len(registers), address_reader(address)
    for register in registers:
        if "s" in instruction.parts[-1] and isinstance(register, Register) and register.width != 8 * item:
            raise NotImplementedError(instruction.text)  # its sign would have to be spread

    def step(batch: Batch, active: Mask | None) -> None:
        addresses = where(batch)
        batch.counts.count_sectors(instruction, "load", addresses, active, size)
        data = np.full((batch.threads, len(registers)), 2 ** (8 * item) - 1, KEPT[8 * item])  # poison where there is nothing
        for allocation, threads, offsets in touched(batch, instruction, addresses, active, size, writing=False):
            data[threads] = read_checked(batch, instruction, allocation, threads, offsets, item, len(registers))
        for i, register in enumerate(registers):
            if isinstance(register, Register):
                batch.write(register.index, data[:, i].astype(KEPT[register.width]), active)

    return step


def _store(instruction: Instruction) -> Step:
    address, values = instruction.operands
    registers = values.parts if isinstance(values, Vector) else (values,)
    item = TYPES[instruction.parts[-1]].itemsize
    size, where = item * len(registers), address_reader(address)
    reads = [reader(register, KEPT[8 * item]) for register in registers]

    def step(batch: Batch, active: Mask | None) -> None:
        addresses = where(batch)
        batch.counts.count_sectors(instruction, "store", addresses, active, size)
        data = np.stack([np.broadcast_to(read(batch), batch.threads) for read in reads], 1)
        for allocation, threads, offsets in touched(batch, instruction, addresses, active, size, writing=True):
            _write_checked(batch, instruction, allocation, threads, offsets, data[threads])

    return step


def touched(
    batch: Batch, instruction: Instruction, addresses: Array, active: Mask | None, size: int, writing: bool
) -> Iterator[tuple[Allocation, Array, Array]]:
    """What the active threads touch: an allocation, which threads ``[n]``, byte offsets in it ``[n]``; checked."""
    threads = batch.selected(active)
    wanted = addresses if active is None else addresses[threads]
    misaligned = wanted & np.uint64(size - 1) != 0
    if misaligned.any():
        example = hex(int(wanted[misaligned][0]))
        batch.finding("misaligned global access", instruction, misaligned.sum(), example)
    parts, outside = batch.memory.split(wanted, size)
    if len(outside):
        example = batch.memory.nearest(int(wanted[outside[0]]))
        batch.finding(f"global {'store' if writing else 'load'} out of bounds", instruction, len(outside), example)
    for allocation, which in parts:
        offsets = wanted[which].astype(np.int64) - allocation.base
        if allocation.allowed is not None:
            between = ~allocation.allowed[offsets[:, None] + np.arange(size)].all(1)
            if between.any():
                kind = f"global {'store to' if writing else 'load of'} what lies between a view's elements"
                batch.finding(kind, instruction, between.sum(), f"{allocation.name}+{offsets[between][0]}")
        sectors = (wanted[which] >> np.uint64(5)).astype(np.int64) - allocation.base // SECTOR
        (allocation.written_sectors if writing else allocation.read_sectors)[sectors] = True
        yield allocation, threads[which], offsets


def _accesses(batch: Batch, instruction: Instruction, threads: Array, offsets: Array, size: int) -> Accesses:
    program, thread, epoch = batch.number[threads], batch.thread[threads], batch.epoch[batch.slot[threads]]
    return Accesses(offsets, size, program, thread, epoch, batch.memory.next_order(), instruction.where)


def read_checked(
    batch: Batch, instruction: Instruction, allocation: Allocation, threads: Array, offsets: Array, item: int, count: int
) -> Array:
    """``count`` numbers of ``item`` bytes for each of the threads, ``[n, count]``."""
    size = item * count
    if allocation.initialised is not None:
        bad = ~allocation.initialised[offsets[:, None] + np.arange(size)].all(1)
        if bad.any():
            example = f"{allocation.name}+{offsets[bad][0]}"
            batch.finding("load of uninitialised global memory", instruction, bad.sum(), example)
    access = _accesses(batch, instruction, threads, offsets, size)
    if allocation.writers is not None:
        writers, granules = allocation.writers, allocation.granules(offsets, size)
        fresh = (writers.program[granules] == access.program[:, None]) & (writers.epoch[granules] == access.epoch[:, None])
        fresh &= writers.thread[granules] != access.thread[:, None]
        if fresh.any():
            kind = "global read after write by another thread without barrier"
            batch.finding(kind, instruction, fresh.sum(), allocation.name)
    allocation.reads.append(access)
    found: Array = allocation.views[item][(offsets // item)[:, None] + np.arange(count)]
    return found


def _write_checked(
    batch: Batch, instruction: Instruction, allocation: Allocation, threads: Array, offsets: Array, data: Array
) -> None:
    """``data`` ``[n, count]`` of the threads, each at its offset."""
    item = data.dtype.itemsize
    size = item * data.shape[1]
    index = (offsets // item)[:, None] + np.arange(data.shape[1])
    granules, writers = allocation.granules(offsets, size), allocation.written_by()
    access = _accesses(batch, instruction, threads, offsets, size)
    program = np.broadcast_to(access.program[:, None], granules.shape)
    thread = np.broadcast_to(access.thread[:, None], granules.shape)
    epoch = np.broadcast_to(access.epoch[:, None], granules.shape)
    changed = (allocation.views[item][index] != data).any(1)[:, None]
    earlier = writers.program[granules]
    others = (earlier >= 0) & (earlier != program)
    for i, j in np.argwhere(others & changed):
        before = writers.moment(granules[i, j])
        if not batch.memory.ordering.ordered(access.moment(i), before):
            example = f"{allocation.name}+{offsets[i]}: programs {before.program} and {program[i, j]}"
            kind = "global bytes written by two programs, different values"
            batch.finding(kind, instruction, (others & changed).sum(), example)
            break
    without = (earlier == program) & (writers.thread[granules] != thread) & (writers.epoch[granules] == epoch) & changed
    if without.any():
        kind = "global bytes written by two threads of a program without barrier, different values"
        batch.finding(kind, instruction, without.sum(), allocation.name)
    allocation.views[item][index] = data
    if allocation.initialised is not None:
        allocation.initialised[offsets[:, None] + np.arange(size)] = True
    differ = allocation.views[item][index] != data
    if differ.any():
        kind = "lanes of one store write different values to one address"
        batch.finding(kind, instruction, differ.sum(), f"{allocation.name}+{offsets[differ.any(1)][0]}")
    writers.several[granules[others]] = True
    for field, value in ((writers.program, program), (writers.thread, thread), (writers.epoch, epoch)):
        field[granules] = value
    writers.several[granules[writers.program[granules] != program]] = True  # two programs in this very store
    writers.order[granules] = access.order


def _atomic(instruction: Instruction) -> Step:
    dtype = TYPES[instruction.parts[-1]]
    result = instruction.operands[0] if instruction.family == "atom" else None
    address, value = instruction.operands[-2:]
    if instruction.parts[-2] != "add" or dtype.kind not in "iu":
        raise NotImplementedError(instruction.text)
    where, read, size = address_reader(address), reader(value, bits_of(dtype)), dtype.itemsize
    lets_know = "acq_rel" in instruction.parts

    def step(batch: Batch, active: Mask | None) -> None:
        addresses, data = where(batch), np.broadcast_to(read(batch), batch.threads)
        old = np.zeros(batch.threads, bits_of(dtype))
        batch.counts.count_sectors(instruction, "atomic", addresses, active, size)
        for allocation, threads, offsets in touched(batch, instruction, addresses, active, size, writing=True):
            access = _accesses(batch, instruction, threads, offsets, size)
            allocation.atomics.append(access)
            if lets_know:
                batch.memory.ordering.note(addresses[threads], access.program, access.thread, access.epoch, access.order)
            old[threads] = add_in_turn(allocation.views[size], offsets // size, data[threads])
        if isinstance(result, Register):
            batch.write(result.index, old, active)

    return step


def add_in_turn(memory: Array, index: Array, data: Array) -> Array:
    """Atomic additions by one thread after another, and what each found ``[n]``."""
    order = np.argsort(index, kind="stable")
    places, added = index[order], data[order]
    before = np.cumsum(added, dtype=added.dtype) - added
    first = np.r_[True, places[1:] != places[:-1]]
    start = np.maximum.accumulate(np.where(first, np.arange(len(places)), 0))
    old = np.empty_like(added)
    old[order] = memory[places] + before - before[start]
    np.add.at(memory, index, data)
    return old
