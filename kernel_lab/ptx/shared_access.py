"""``ld.shared``, ``st.shared`` and ``atom.shared``, and the checks that every access to shared memory goes through."""

from collections.abc import Iterator

import numpy as np

from kernel_lab.ptx.batch import Batch
from kernel_lab.ptx.findings import NOTE
from kernel_lab.ptx.global_access import add_in_turn
from kernel_lab.ptx.instructions import Instruction, Register, Vector
from kernel_lab.ptx.operands import KEPT, TYPES, Array, Mask, Step, address_reader, bits_of, reader


def decode(instruction: Instruction) -> Step | None:
    """What an instruction does, or ``None`` where it does not touch shared memory alone."""
    families = {"ld": _load, "st": _store, "atom": _atomic, "red": _atomic}
    if "shared" not in instruction.parts or instruction.family not in families:
        return None
    return families[instruction.family](instruction)


def _load(instruction: Instruction) -> Step:
    to, address = instruction.operands
    registers = to.parts if isinstance(to, Vector) else (to,)
    item = TYPES[instruction.parts[-1]].itemsize
    size, where = item * len(registers), address_reader(address)

    def step(batch: Batch, active: Mask | None) -> None:
        offsets = where(batch)
        data = np.full((batch.threads, len(registers)), 2 ** (8 * item) - 1, KEPT[8 * item])
        batch.counts.count_banks(instruction, offsets, active, size)
        for threads, flat in reached(batch, instruction, offsets, active, size, "read"):
            data[threads] = batch.shared.views[item][(flat // item)[:, None] + np.arange(len(registers))]
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
        offsets = where(batch)
        data = np.stack([np.broadcast_to(read(batch), batch.threads) for read in reads], 1)
        batch.counts.count_banks(instruction, offsets, active, size)
        store_checked(batch, instruction, offsets, active, data)

    return step


def _atomic(instruction: Instruction) -> Step:
    dtype = TYPES[instruction.parts[-1]]
    result = instruction.operands[0] if instruction.family == "atom" else None
    address, value = instruction.operands[-2:]
    if instruction.parts[-2] != "add" or dtype.kind not in "iu":
        raise NotImplementedError(instruction.text)
    where, read, size = address_reader(address), reader(value, bits_of(dtype)), dtype.itemsize

    def step(batch: Batch, active: Mask | None) -> None:
        data = np.broadcast_to(read(batch), batch.threads)
        old = np.zeros(batch.threads, bits_of(dtype))
        for threads, flat in reached(batch, instruction, where(batch), active, size, "atomic"):
            old[threads] = add_in_turn(batch.shared.views[size], flat // size, data[threads])
            batch.shared.initialised[flat[:, None] + np.arange(size)] = True
        if isinstance(result, Register):
            batch.write(result.index, old, active)

    return step


def inside(
    batch: Batch, instruction: Instruction, offsets: Array, active: Mask | None, size: int, kind: str
) -> tuple[Array, Array]:
    """The threads ``[n]`` whose accesses lie within their program's memory, and where in the batch's, ``[n]``."""
    threads = batch.selected(active)
    wanted = offsets if active is None else offsets[threads]
    outside = (wanted < 0) | (wanted + size > batch.launch.shared_bytes)
    if outside.any():
        example = f"{wanted[outside][0]} of {batch.launch.shared_bytes}"
        batch.finding(f"shared {kind} out of bounds", instruction, outside.sum(), example)
        threads, wanted = threads[~outside], wanted[~outside]
    misaligned = wanted % size != 0
    if misaligned.any():
        batch.finding("misaligned shared access", instruction, misaligned.sum(), str(wanted[misaligned][0]))
    return threads, wanted + batch.slot[threads].astype(np.int64) * batch.shared.pitch


def reached(
    batch: Batch, instruction: Instruction, offsets: Array, active: Mask | None, size: int, kind: str
) -> Iterator[tuple[Array, Array]]:
    """What :func:`inside` gives, checked for races; nothing where no thread is left."""
    threads, flat = inside(batch, instruction, offsets, active, size, kind)
    if len(threads):
        check_races(batch, instruction, flat, size, threads, kind)
        yield threads, flat


def check_races(batch: Batch, instruction: Instruction, flat: Array, size: int, threads: Array, kind: str) -> Mask:
    """Notes accesses ``[n]``; which of them write what another warp has written since the last barrier."""
    shared = batch.shared
    clash, again = shared.note(kind, flat, size, batch.warp[threads])
    if clash.any():
        example = f"bytes {flat[clash][0] % shared.pitch}.. of program {batch.number[threads[clash][0]]}"
        batch.finding(f"shared-memory race ({kind})", instruction, clash.sum(), example)
    every = flat[:, None] + np.arange(size)
    if shared.arriving[every].any():
        batch.finding("shared memory used while a copy into it is in flight", instruction)
    if kind == "read":
        bad = ~shared.initialised[every].all(1)
        if bad.any():
            batch.finding("load of uninitialised shared memory", instruction, bad.sum())
    elif shared.in_flight[every].any():
        batch.finding("write to an operand of a wgmma in flight", instruction)
    return again


def store_checked(batch: Batch, instruction: Instruction, offsets: Array, active: Mask | None, data: Array) -> None:
    """``data`` ``[threads, count]`` of the active threads, each at its offset ``[threads]``."""
    size = data.shape[1] * data.dtype.itemsize
    threads, flat = inside(batch, instruction, offsets, active, size, "write")
    if len(threads):
        store_inside(batch, instruction, flat, threads, data[threads])


def store_inside(batch: Batch, instruction: Instruction, flat: Array, threads: Array, data: Array) -> None:
    """``data`` ``[n, count]`` where :func:`inside` says that it goes."""
    size, item = data.shape[1] * data.dtype.itemsize, data.dtype.itemsize
    again = check_races(batch, instruction, flat, size, threads, "write")
    view, slots = batch.shared.views[item], (flat // item)[:, None] + np.arange(data.shape[1])
    if again.any():
        changed = again & (view[slots] != data).any(1)
        if changed.any():
            batch.finding("shared-memory race (write)", instruction, changed.sum())
        else:
            batch.finding(f"{NOTE}several warps store the same to shared memory", instruction, again.sum())
    view[slots] = data
    batch.shared.initialised[flat[:, None] + np.arange(size)] = True
    differ = view[slots] != data
    if differ.any():
        batch.finding("lanes of one shared store write different values to one address", instruction, differ.sum())
