"""Runs a launch: many programs in lockstep, every thread with a place of its own in the code.

The threads with the smallest place go first, so that branches meet again where they end (:mod:`.control_flow` sees to the
order); threads at a barrier wait for the rest of their program. What is found is noted and never fatal: a load of nothing
gives poison.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kernel_lab.ptx.allocations import GlobalMemory
from kernel_lab.ptx.batch import WARP, Batch, Launch
from kernel_lab.ptx.decoding import Code, Decoded, Flow
from kernel_lab.ptx.findings import Findings
from kernel_lab.ptx.operands import Array, Mask
from kernel_lab.ptx.traffic import Banks, Counts, Traffic
from kernel_lab.ptx.warpgroups import check_registers

THREADS_AT_ONCE = 8192
MOST_STEPS = 20_000_000  # of one batch: a loop that never ends is an error


@dataclass(frozen=True)
class Launched:
    """What one launch did.

    Attributes:
        kernel: its name.
        programs: how many there were.
        shared_bytes: of shared memory, each.
        issued: how many threads came to each instruction, int64 ``[instructions]``.
        performed: how many of them did it, their guard being true.
        traffic: of each instruction that touched global memory.
        banks: of shared memory, by line of source.
        by_line: of :attr:`issued`, by line of source.
        moved: bytes of the distinct sectors that were read, and of those that were written, by the address of the
            allocation that they belong to.
    """

    kernel: str
    programs: int
    shared_bytes: int
    issued: Array
    performed: Array
    traffic: tuple[Traffic, ...]
    banks: Mapping[str, Banks]
    by_line: Mapping[str, int]
    moved: Mapping[int, tuple[int, int]]

    @property
    def read_bytes(self) -> int:
        return sum(read for read, _ in self.moved.values())

    @property
    def written_bytes(self) -> int:
        return sum(written for _, written in self.moved.values())

    def sectors(self, *kinds: str) -> int:
        """Requested by warps, of ``"load"``, ``"store"`` or ``"atomic"``."""
        return sum(traffic.sectors for traffic in self.traffic if traffic.kind in kinds)


def execute(
    code: Code,
    grid: tuple[int, int, int],
    arguments: list[int],
    memory: GlobalMemory,
    findings: Findings,
    shared_bytes: int,
    warps: int,
    order: Array | None = None,
    at_once: int | None = None,
) -> Launched:
    """One launch, in place in the memory.

    Args:
        grid: programs in each dimension.
        arguments: of all parameters, in their order; addresses for pointers.
        shared_bytes: of each program.
        warps: of each program.
        order: in which programs run, a permutation of their numbers.
        at_once: how many run in lockstep; as many as make :data:`THREADS_AT_ONCE` threads if ``None``.

    Raises:
        ValueError: the number of arguments is not that of the parameters.
        NotImplementedError: an instruction is used in a way that is not known.
    """
    program = code.program
    if len(arguments) != len(program.parameters):
        raise ValueError(f"{program.name} has {len(program.parameters)} parameters, got {len(arguments)} arguments")
    by_name = {name: value for (name, _), value in zip(program.parameters, arguments, strict=True)}
    zeros = np.zeros(len(code.instructions), np.int64)
    counts = Counts(zeros, zeros.copy())
    launch = Launch(program, grid, by_name, memory, findings, counts, shared_bytes, warps)
    order = np.arange(launch.programs) if order is None else order
    at_once = at_once or max(1, THREADS_AT_ONCE // launch.threads_per_program)
    memory.begin_launch()
    with np.errstate(all="ignore"):
        for start in range(0, launch.programs, at_once):
            _Lockstep(code.instructions, Batch(launch, order[start : start + at_once])).run()
    memory.end_launch(findings, program.name)
    by_line: defaultdict[str, int] = defaultdict(int)
    for instruction, issued in zip(program.instructions, counts.issued.tolist(), strict=True):
        by_line[instruction.where] += issued
    counted = counts.issued, counts.performed, tuple(counts.traffic.values()), dict(counts.banks), dict(by_line)
    return Launched(program.name, launch.programs, shared_bytes, *counted, memory.unique_bytes())


class _Lockstep:
    """Groups of threads of a batch, by the number of the instruction that they come to next."""

    def __init__(self, code: list[Decoded], batch: Batch) -> None:
        self._code, self._batch = code, batch
        self._groups: dict[int, Mask] = {0: np.ones(batch.threads, bool)}
        self._places = [0]  # of the groups, a heap
        self._alive = np.ones(batch.threads, bool)
        self._waiting = np.zeros(batch.threads, bool)
        self._barrier = np.full(batch.threads, -1, np.int32)  # where each waits
        self._steps = 0

    def run(self) -> None:
        while self._places:
            place = heapq.heappop(self._places)
            self._run_group(place, self._groups.pop(place))
        assert not self._alive.any(), "barriers are passed when all threads that are left wait there"

    def _join(self, place: int, mask: Mask) -> None:
        if place in self._groups:
            self._groups[place] = self._groups[place] | mask
        elif mask.any():
            self._groups[place] = mask
            heapq.heappush(self._places, place)

    def _run_group(self, place: int, mask: Mask) -> None:
        """Until the threads part, wait or end, or come to where others are."""
        batch, issued, performed = self._batch, self._batch.counts.issued, self._batch.counts.performed
        count = int(np.count_nonzero(mask))
        group = None if count == batch.threads else mask
        limit = self._places[0] if self._places else len(self._code)
        while True:
            issued[place] += count
            flow, instruction, step, guard, negated, target = self._code[place]
            active = group
            if guard is not None:
                active = ~batch.registers[guard] if negated else batch.registers[guard]
                if group is not None:
                    active = active & group
            if flow is Flow.NEXT:
                doing = count if guard is None or active is None else int(np.count_nonzero(active))
                if doing:
                    performed[place] += doing
                    active = None if doing == batch.threads else active
                    if batch.in_flight.results:
                        check_registers(batch, instruction, active)
                    step(batch, active)
                place += 1
            elif flow is Flow.BRANCH:
                taken = mask if guard is None or active is None else active
                taking = int(np.count_nonzero(taken))
                if 0 < taking < count:
                    self._join(target, taken)
                    return self._join(place + 1, mask & ~taken)
                place = target if taking else place + 1
            elif flow is Flow.BARRIER:
                return self._arrive(place, mask)
            else:
                self._alive &= ~mask
                return self._release()
            if place >= limit:
                return self._join(place, mask)
            self._steps += 1
            if self._steps > MOST_STEPS:
                raise RuntimeError(f"{batch.launch.program.name} has not ended after {MOST_STEPS} steps")

    def _arrive(self, place: int, mask: Mask) -> None:
        self._waiting |= mask
        self._barrier[mask] = place
        by_warp = mask.reshape(-1, WARP)
        partial = by_warp.any(1) & ~by_warp.all(1)
        if partial.any():
            self._finding("barrier reached by part of a warp", place, int(partial.sum()))
        self._release()

    def _release(self) -> None:
        """Lets the programs go on of which all threads wait that are alive."""
        batch, per_program = self._batch, self._batch.launch.threads_per_program
        waiting, alive = self._waiting.reshape(-1, per_program), self._alive.reshape(-1, per_program)
        ready = (waiting == alive).all(1) & alive.any(1)
        if not ready.any():
            return
        released = np.repeat(ready, per_program) & self._waiting
        places = np.unique(self._barrier[released])
        if len(places) > 1 or not alive[ready].all():
            self._check_barriers(ready, alive)
        self._waiting &= ~released
        batch.epoch[ready] += 1
        batch.shared.pass_barrier(np.flatnonzero(ready))
        for place in places.tolist():
            self._join(place + 1, released & (self._barrier == place))

    def _check_barriers(self, ready: Mask, alive: Mask) -> None:
        for slot in np.flatnonzero(ready):
            places = np.unique(self._barrier.reshape(alive.shape)[slot][alive[slot]])
            if len(places) > 1:
                self._finding("warps meet at different barriers", int(places[0]))
            if not alive[slot].all():
                self._finding("barrier after some threads have returned", int(places[0]))

    def _finding(self, kind: str, place: int, count: int = 1) -> None:
        self._batch.finding(kind, self._batch.launch.program.instructions[place], count)
