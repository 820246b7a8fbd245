"""What is counted: instructions, sectors of 32 bytes between the SMs and the L2 cache, and conflicts of banks."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from kernel_lab.ptx.allocations import SECTOR
from kernel_lab.ptx.instructions import Instruction
from kernel_lab.ptx.operands import Array, Mask

WARP = 32
BANKS = 32  # of 4 bytes each
NOWHERE = np.uint64(2**64 - 1)


@dataclass
class Traffic:
    """Of one instruction that reads or writes global memory, in one launch.

    Attributes:
        where: the line of source.
        kind: ``"load"``, ``"store"`` or ``"atomic"``.
        requests: times a warp made it.
        lanes: times a thread did.
        sectors: that these requests touch, each counted once a request.
        fewest: sectors, had the distinct bytes of each request lain together.
    """

    where: str
    kind: str
    requests: int = 0
    lanes: int = 0
    sectors: int = 0
    fewest: int = 0


@dataclass
class Banks:
    """Of the accesses to shared memory of one line of source: passes that the banks need, and the fewest possible."""

    passes: int = 0
    fewest: int = 0


@dataclass
class Counts:
    """Of one launch, int64 ``[instructions]`` each.

    Attributes:
        issued: how many threads came to an instruction.
        performed: how many of them did it: those whose guard, if there is one, is true.
        traffic: of the instructions that touch global memory, by their place in the code.
        banks: of shared memory, by line of source.
    """

    issued: Array
    performed: Array
    traffic: dict[int, Traffic] = field(default_factory=dict)
    banks: defaultdict[str, Banks] = field(default_factory=lambda: defaultdict(Banks))

    def count_sectors(self, instruction: Instruction, kind: str, addresses: Array, active: Mask | None, size: int) -> None:
        """An access of ``size`` bytes by each active thread, at ``addresses`` uint64 ``[threads]``."""
        known = self.traffic.get(instruction.place)
        if known is None:
            known = self.traffic[instruction.place] = Traffic(instruction.where, kind)
        wanted = addresses if active is None else np.where(active, addresses, NOWHERE)
        wanted = np.sort(wanted.reshape(-1, WARP), axis=1)
        valid = wanted != NOWHERE
        new = np.ones(wanted.shape, bool)
        new[:, 1:] = wanted[:, 1:] != wanted[:, :-1]
        distinct = (new & valid).sum(1)
        wanted >>= np.uint64(5)
        new[:, 1:] = wanted[:, 1:] != wanted[:, :-1]
        known.requests += int(valid[:, 0].sum())
        known.lanes += int(valid.sum())
        known.sectors += int((new & valid).sum())
        known.fewest += int((-(-distinct * size // SECTOR)).sum())

    def count_banks(self, instruction: Instruction, offsets: Array, active: Mask | None, size: int) -> None:
        """An access of ``size`` bytes by each active thread, at ``offsets`` int64 ``[threads]`` into shared memory.

        Wide ones are served some lanes at a time: 16 bytes to a quarter of a warp.
        """
        at_once = WARP if size <= 4 else WARP * 4 // size
        words = offsets.reshape(-1, at_once) // 4
        wide = max(1, size // 4)
        words = (words[:, :, None] + np.arange(wide)).reshape(len(words), -1)
        if active is not None:
            words = np.where(np.repeat(active.reshape(-1, at_once), wide, axis=1), words, 2**40)
        words = np.sort(words, axis=1)
        new = words < 2**40
        new[:, 1:] &= words[:, 1:] != words[:, :-1]
        rows, columns = np.nonzero(new)
        per_bank = np.bincount(rows * BANKS + words[rows, columns] % BANKS, minlength=len(words) * BANKS).reshape(-1, BANKS)
        used = self.banks[instruction.where]
        used.passes += int(per_bank.max(1).sum())
        used.fewest += int((per_bank.any(1)).sum())
