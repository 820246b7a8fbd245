"""The state of all threads of some programs of a launch, which run in lockstep."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernel_lab.ptx.allocations import GlobalMemory
from kernel_lab.ptx.findings import Findings
from kernel_lab.ptx.instructions import Instruction, Program
from kernel_lab.ptx.operands import KEPT, Array, Mask
from kernel_lab.ptx.shared_memory import SharedMemory
from kernel_lab.ptx.traffic import Counts

WARP = 32
NEVER_WRITTEN = 0xCDCDCDCDCDCDCDCD  # what registers hold at first


@dataclass
class Launch:
    """What all programs of a launch have in common.

    Attributes:
        grid: programs in each dimension.
        arguments: by the name of the parameter; addresses for pointers.
        shared_bytes: of shared memory, for each program.
        warps: of each program.
    """

    program: Program
    grid: tuple[int, int, int]
    arguments: dict[str, int]
    memory: GlobalMemory
    findings: Findings
    counts: Counts
    shared_bytes: int
    warps: int

    @property
    def threads_per_program(self) -> int:
        return self.warps * WARP

    @property
    def programs(self) -> int:
        x, y, z = self.grid
        return x * y * z


@dataclass
class InFlight:
    """What asynchronous instructions of a batch have begun and nobody has waited for.

    Attributes:
        copies: into shared memory; ``copy_group`` ``[threads]`` counts the groups that each thread has closed.
        products: whose operands are being read; ``product_group`` ``[threads]`` the same for them.
        results: the registers that products will write, ``sources`` those that they read: of each the group ``[threads]``,
            -1 for threads without such a product.
    """

    copy_group: Array
    product_group: Array
    copies: list[Any] = field(default_factory=list)
    products: list[Any] = field(default_factory=list)
    results: dict[int, Array] = field(default_factory=dict)
    sources: dict[int, Array] = field(default_factory=dict)


class Batch:
    """Attributes, of each thread ``[threads]``:

    ``thread`` (its number in its program), ``warp``, ``lane``, ``slot`` (which program of the batch), ``number`` (of its
    program in the launch), ``warp_begin`` (the first thread of its warp, in the batch). ``epoch`` ``[programs]`` counts the
    barriers that each program has passed. ``registers`` has an array ``[threads]`` for each register.
    """

    def __init__(self, launch: Launch, programs: Array) -> None:
        per_program = launch.threads_per_program
        self.launch, self.memory, self.findings, self.counts = launch, launch.memory, launch.findings, launch.counts
        self.threads = len(programs) * per_program
        index = np.arange(self.threads)
        self.thread = (index % per_program).astype(np.int32)
        self.slot = (index // per_program).astype(np.int32)
        self.number = programs[self.slot].astype(np.int32)
        self.warp = self.thread // WARP
        self.lane = (index % WARP).astype(np.uint32)
        self.warp_begin = index - index % WARP
        self.epoch = np.zeros(len(programs), np.int32)
        self.special = self._special()
        poison = {
            width: np.full(self.threads, NEVER_WRITTEN & (2 ** (8 * kept.itemsize) - 1), np.uint64).astype(kept)
            for width, kept in KEPT.items()
        }
        self.registers = [poison[width] for width in launch.program.widths]  # which are replaced, never changed in place
        self.shared = SharedMemory(len(programs), launch.shared_bytes, launch.warps)
        self.stack = np.full((self.threads, launch.program.stack), 0xFF, np.uint8)
        self.in_flight = InFlight(np.zeros(self.threads, np.int32), np.zeros(self.threads, np.int32))

    def _special(self) -> dict[str, Array]:
        width, height, depth = self.launch.grid
        places = self.number % width, self.number // width % height, self.number // (width * height)
        zero = np.zeros(self.threads, np.uint32)
        special = {f"ctaid.{axis}": place.astype(np.uint32) for axis, place in zip("xyz", places, strict=True)}
        special |= {f"nctaid.{axis}": np.array(n, np.uint32) for axis, n in zip("xyz", (width, height, depth), strict=True)}
        special |= {"tid.x": self.thread.astype(np.uint32), "tid.y": zero, "tid.z": zero, "laneid": self.lane}
        special |= {"ntid.x": np.array(self.launch.threads_per_program, np.uint32), "warpid": self.warp.astype(np.uint32)}
        return special

    def write(self, index: int, value: Array, active: Mask | None) -> None:
        """A register of the threads that are active."""
        register = self.registers[index]
        if value.dtype != register.dtype:
            value = value.view(register.dtype)
        if active is not None:
            value = np.where(active, value, register)
        elif not value.shape:
            value = np.full(self.threads, value, register.dtype)
        self.registers[index] = value

    def selected(self, active: Mask | None) -> Array:
        """The active threads, by their number in the batch."""
        return np.arange(self.threads) if active is None else np.flatnonzero(active)

    def finding(self, kind: str, instruction: Instruction, count: Any = 1, example: str = "") -> None:
        where = f"{self.launch.program.name} {instruction.where} [{instruction.text[:70]}]"
        self.findings.add(kind, where, int(count), example)

    def check_members(self, instruction: Instruction, active: Mask | None, members: Array) -> None:
        """An instruction that synchronises lanes needs all that its mask names, uint32 ``[threads]`` or ``[]``."""
        if active is None:
            return
        there = active.reshape(-1, WARP) @ (np.uint64(1) << np.arange(WARP, dtype=np.uint64))
        wanted = np.broadcast_to(members, self.threads).reshape(-1, WARP)[:, 0].astype(np.uint64)
        missing = (there != 0) & ((wanted & ~there) != 0)
        if missing.any():
            self.finding("synchronising instruction without all its lanes", instruction, missing.sum())
