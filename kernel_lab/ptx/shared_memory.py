"""Shared memory: that of each program of a batch, with who touched which byte since the last barrier."""

import numpy as np

from kernel_lab.ptx.operands import KEPT, Array, Mask

POISON = 0xFF
# Accesses of which two by different warps, with no barrier in between, are a race.
CLASHES = {"read": ("write", "atomic"), "write": ("read", "atomic"), "atomic": ("read", "write")}


class SharedMemory:
    """One array for all programs, ``pitch`` bytes each.

    Attributes:
        views: the memory as integers, by their bytes.
        initialised: of each byte whether it was ever written.
        in_flight: of each byte how many matrix products still read it.
        arriving: of each byte how many copies that nobody has waited for write it.
        accesses: of each byte the set of warps, as bits, that did this to it since the last barrier.
    """

    def __init__(self, programs: int, size: int, warps: int) -> None:
        self.size, self.pitch = size, max(16, -(-size // 16) * 16)
        self._data = np.full(programs * self.pitch, POISON, np.uint8)
        self.views = {width // 8: self._data.view(KEPT[width]) for width in (8, 16, 32, 64)}
        self.initialised = np.zeros(programs * self.pitch, bool)
        self.in_flight = np.zeros(programs * self.pitch, np.uint8)
        self.arriving = np.zeros(programs * self.pitch, np.uint8)
        bits = KEPT[max(8, 1 << (warps - 1).bit_length())]
        self.accesses = {kind: np.zeros(programs * self.pitch, bits) for kind in CLASHES}

    def pass_barrier(self, programs: Array) -> None:
        """Of these programs of the batch."""
        for warps in self.accesses.values():
            warps.reshape(-1, self.pitch)[programs] = 0

    def note(self, kind: str, offset: Array, size: int, warp: Array) -> tuple[Mask, Mask]:
        """Accesses ``[n]``: which of them clash with an earlier one of another warp, and which write what another warp has
        written, which is harmless if it is the same."""
        item = self.accesses[kind].itemsize
        unit = min(size, 8 // item)  # bytes that are looked at together
        wide = KEPT[8 * unit * item]
        every = wide.type(sum(1 << 8 * item * i for i in range(unit)))
        own = every << warp.astype(wide)
        clash, again = np.zeros(len(offset), bool), np.zeros(len(offset), bool)
        tables = {name: warps.view(wide) for name, warps in self.accesses.items()}
        for start in range(0, size, unit):
            index = (offset + start) // unit
            for other in CLASHES[kind]:
                clash |= (tables[other][index] & ~own) != 0
            if kind == "write":
                again |= (tables[kind][index] & ~own) != 0
            _add_bits(tables[kind], index, own)
        return clash, again


def _add_bits(table: Array, index: Array, bits: Array) -> None:
    """``table[index] |= bits``, also where an index comes twice."""
    missing = np.ones(len(index), bool)
    while missing.any():  # one of those that share a place is done in each round, nearly always all of them in the first
        table[index[missing]] |= bits[missing]
        missing[missing] = (table[index[missing]] & bits[missing]) != bits[missing]
