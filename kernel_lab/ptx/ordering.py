"""Which accesses of two programs come one after the other for certain: after barriers and atomics, not by chance.

Programs run in any order. Only an atomic that acquires and releases lets one know of another: what a program did before such
an atomic, seen by its barriers, has happened for whoever does a later one at the same address, and for what it does
afterwards. Programs that hear of each other through a third at another address are not followed.
"""

from collections import defaultdict
from typing import NamedTuple

from kernel_lab.ptx.operands import Array


class Moment(NamedTuple):
    """When something was done: by which program and thread, after how many barriers of the program, as the how-manieth."""

    program: int
    thread: int
    epoch: int
    order: int


class _Atomic(NamedTuple):
    address: int
    position: int  # among those at this address
    moment: Moment


class Ordering:
    """The atomics of one launch that acquire and release."""

    def __init__(self) -> None:
        self._of_program: dict[int, list[_Atomic]] = defaultdict(list)
        self._done_at: dict[int, int] = defaultdict(int)

    def note(self, addresses: Array, programs: Array, threads: Array, epochs: Array, order: int) -> None:
        """Atomics of several threads ``[n]``, which happen in this order."""
        for address, program, thread, epoch in zip(
            *(part.tolist() for part in (addresses, programs, threads, epochs)), strict=True
        ):
            atomic = _Atomic(address, self._done_at[address], Moment(program, thread, epoch, order))
            self._done_at[address] += 1
            self._of_program[program].append(atomic)

    def ordered(self, one: Moment, other: Moment) -> bool:
        """Whether it is certain which of two accesses of different programs comes first."""
        first, second = sorted((one, other), key=lambda moment: moment.order)
        releases = [atomic for atomic in self._of_program.get(first.program, ()) if _before(first, atomic.moment)]
        acquires = [atomic for atomic in self._of_program.get(second.program, ()) if _before(atomic.moment, second)]
        return any(
            release.address == acquire.address and release.position < acquire.position
            for release in releases
            for acquire in acquires
        )


def _before(first: Moment, second: Moment) -> bool:
    """Of one program: in the same thread, or with a barrier in between."""
    if first.order > second.order:
        return False
    return first.thread == second.thread or first.epoch < second.epoch
