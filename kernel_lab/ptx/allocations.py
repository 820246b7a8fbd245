"""Global memory: the tensors of this process that kernels may touch, and who touched what in a launch."""

import ctypes
from typing import NamedTuple

import numpy as np

from kernel_lab.ptx.findings import NOTE, Findings
from kernel_lab.ptx.operands import KEPT, Array, Mask
from kernel_lab.ptx.ordering import Moment, Ordering

SECTOR = 32  # bytes: what memory moves at least
MOST_COMPARED = 20_000  # pairs of accesses of one place in the code


class Accesses(NamedTuple):
    """Of one instruction: byte offset, program, thread and barriers passed, each ``[n]``; ``order`` counts instructions."""

    offset: Array
    size: int
    program: Array
    thread: Array
    epoch: Array
    order: int
    where: str

    def moment(self, i: int) -> Moment:
        return Moment(int(self.program[i]), int(self.thread[i]), int(self.epoch[i]), self.order)


class Writers:
    """Who wrote each granule (4 bytes, or an element if that is smaller) last in this launch; ``program`` -1: nobody."""

    def __init__(self, granules: int) -> None:
        self.program = np.full(granules, -1, np.int32)
        self.thread = np.zeros(granules, np.int32)
        self.epoch = np.zeros(granules, np.int32)
        self.order = np.zeros(granules, np.int32)
        self.several = np.zeros(granules, bool)  # programs

    def moment(self, granule: int) -> Moment:
        fields = self.program, self.thread, self.epoch, self.order
        return Moment(*(int(field[granule]) for field in fields))


class Allocation:
    """A tensor's storage.

    Attributes:
        base: address of its first byte.
        bytes: the memory itself, uint8 ``[size]``; ``views`` the same as wider integers, by their bytes.
        initialised: of each byte whether it was ever written; ``None`` if all were.
        allowed: of each byte whether it belongs to an element of a tensor; ``None`` if all do.
    """

    def __init__(self, name: str, base: int, size: int, itemsize: int, keeps_alive: object) -> None:
        self.name, self.base, self.size, self.end = name, base, size, base + size
        self._keeps_alive = keeps_alive
        self.bytes: Array = np.empty(0, np.uint8)
        if size:
            self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
        self.views = {width // 8: self.bytes[: size - size % (width // 8)].view(KEPT[width]) for width in (8, 16, 32, 64)}
        self.granule = min(4, itemsize)
        self.initialised: Mask | None = None
        self.allowed: Mask | None = None
        self.begin_launch()

    def begin_launch(self) -> None:
        sectors = (self.end - 1) // SECTOR - self.base // SECTOR + 1 if self.size else 0
        self.read_sectors, self.written_sectors = np.zeros(sectors, bool), np.zeros(sectors, bool)
        self.writers: Writers | None = None
        self.reads: list[Accesses] = []
        self.atomics: list[Accesses] = []

    def granules(self, offset: Array, size: int) -> Array:
        """Those of accesses ``[n]``: ``[n, granules of one]``."""
        first: Array = (offset // self.granule)[:, None]
        return first + np.arange(max(1, size // self.granule))

    def written_by(self) -> Writers:
        if self.writers is None:
            self.writers = Writers(self.size // self.granule + 1)
        return self.writers


class GlobalMemory:
    """All allocations, by their addresses."""

    def __init__(self) -> None:
        self.allocations: dict[int, Allocation] = {}
        self.order = 0  # instructions of this launch that touched memory
        self.ordering = Ordering()
        self._sort()

    def register(self, name: str, base: int, size: int, itemsize: int, keeps_alive: object) -> Allocation:
        known = self.allocations.get(base)
        if known is None or known.size != size:
            known = self.allocations[base] = Allocation(name, base, size, itemsize, keeps_alive)
            self._sort()
        return known

    def _sort(self) -> None:
        self._sorted = [self.allocations[base] for base in sorted(self.allocations) if self.allocations[base].size]
        self._bases = np.array([allocation.base for allocation in self._sorted], np.uint64)
        self._ends = np.array([allocation.end for allocation in self._sorted], np.uint64)

    def begin_launch(self) -> None:
        self.order, self.ordering = 0, Ordering()
        for allocation in self._sorted:
            allocation.begin_launch()

    def next_order(self) -> int:
        self.order += 1
        return self.order

    def split(self, addresses: Array, size: int) -> tuple[list[tuple[Allocation, Array]], Array]:
        """Accesses ``[n]`` by what they touch: ``(allocation, which of them)``; then those that touch none."""
        if not self._sorted:
            return [], np.arange(len(addresses))
        found = np.searchsorted(self._bases, addresses, "right").astype(np.int64) - 1
        inside = (found >= 0) & (addresses + np.uint64(size) <= self._ends[np.maximum(found, 0)])
        if inside.all() and len(found) and (found == found[0]).all():
            return [(self._sorted[found[0]], np.arange(len(found)))], np.empty(0, np.int64)
        parts = [(self._sorted[k], np.flatnonzero(inside & (found == k))) for k in np.unique(found[inside])]
        return parts, np.flatnonzero(~inside)

    def nearest(self, address: int) -> str:
        """Where an address is that belongs to nothing."""
        if not self._sorted:
            return "nothing is allocated"
        a = min(self._sorted, key=lambda a: max(a.base - address, address - a.end + 1, 0))
        if address >= a.end:
            return f"{address - a.end:+d} from the end of {a.name} ({a.size} bytes)"
        return f"{address - a.base:+d} from the start of {a.name}"

    def unique_bytes(self) -> dict[int, tuple[int, int]]:
        """Of the sectors read and of those written in this launch, what must come from memory and go there: of the
        allocations that were touched, by their addresses."""
        sectors = ((a.base, int(a.read_sectors.sum()), int(a.written_sectors.sum())) for a in self._sorted)
        return {base: (read * SECTOR, written * SECTOR) for base, read, written in sectors if read or written}

    def end_launch(self, findings: Findings, kernel: str) -> None:
        """What only the whole launch tells: reads by one program of what another writes, whoever came first here."""
        for allocation in self._sorted:
            for read in allocation.reads if allocation.writers is not None else ():
                self._compare_with_writers(allocation, read, findings, kernel, "read by one program, written by another")
                _compare_in_program(allocation, read, findings, kernel)
            for atomic in allocation.atomics if allocation.writers is not None else ():
                self._compare_with_writers(allocation, atomic, findings, kernel, "write and atomic in one launch")
            if allocation.atomics and allocation.reads:
                self._compare_with_atomics(allocation, findings, kernel)

    def _compare_with_writers(
        self, allocation: Allocation, access: Accesses, findings: Findings, kernel: str, kind: str
    ) -> None:
        writers = allocation.written_by()
        granules = allocation.granules(access.offset, access.size)
        program = access.program[:, None]
        written = writers.program[granules]
        suspect = (written >= 0) & ((written != program) | writers.several[granules])
        pairs = np.argwhere(suspect)[:MOST_COMPARED]
        bad = [
            (i, j)
            for i, j in pairs
            if writers.several[granules[i, j]] or not self.ordering.ordered(access.moment(i), writers.moment(granules[i, j]))
        ]
        if bad:
            i, j = bad[0]
            example = f"{allocation.name}+{access.offset[i]}: program {access.program[i]}, written by {written[i, j]}"
            findings.add(kind, f"{kernel} {access.where}", len(bad), example)

    def _compare_with_atomics(self, allocation: Allocation, findings: Findings, kernel: str) -> None:
        """Reads of what other programs count in."""
        by_granule: dict[int, list[tuple[Accesses, int]]] = {}
        for atomic in allocation.atomics:
            for i, granule in enumerate(allocation.granules(atomic.offset, atomic.size)[:, 0].tolist()):
                by_granule.setdefault(granule, []).append((atomic, i))
        counted = np.zeros(allocation.size // allocation.granule + 1, bool)
        counted[list(by_granule)] = True
        for read in allocation.reads:
            granules = allocation.granules(read.offset, read.size)
            for i, j in np.argwhere(counted[granules])[:MOST_COMPARED]:
                for atomic, k in by_granule[int(granules[i, j])]:
                    if atomic.program[k] == read.program[i] or self.ordering.ordered(read.moment(i), atomic.moment(k)):
                        continue
                    findings.add("read and atomic in one launch", f"{kernel} {read.where}", 1, allocation.name)
                    break


def _compare_in_program(allocation: Allocation, read: Accesses, findings: Findings, kernel: str) -> None:
    """Reads after which another warp of the program writes without a barrier: harmless if all lanes read before."""
    writers = allocation.written_by()
    granules = allocation.granules(read.offset, read.size)
    thread, epoch = read.thread[:, None], read.epoch[:, None]
    later = (writers.program[granules] == read.program[:, None]) & (writers.epoch[granules] == epoch)
    later &= (writers.order[granules] > read.order) & (writers.thread[granules] // 32 != thread // 32)
    if later.any():
        i, j = np.argwhere(later)[0]
        writer = writers.moment(granules[i, j])
        example = f"{allocation.name}+{read.offset[i]}: read by thread {read.thread[i]}, then written by {writer.thread}"
        kind = f"{NOTE}global write after read by another warp without barrier"
        findings.add(kind, f"{kernel} {read.where}", int(later.sum()), example)
