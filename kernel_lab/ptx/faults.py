"""Faults that are planted in the PTX of kernels, one at a time: what the machine must see."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kernel_lab.ptx.cases import Case
from kernel_lab.ptx.checking import Outcome, deviation, expected, run
from kernel_lab.ptx.decoding import decode
from kernel_lab.ptx.instructions import Instruction
from kernel_lab.ptx.machine import Launched


@dataclass(frozen=True)
class Fault:
    """A mistake that a compiler, or a hand, could make: a place in the PTX, and what it becomes."""

    name: str
    pattern: str
    replacement: str


OF_SHARED_MEMORY = ("ldmatrix", "stmatrix", "wgmma")  # besides those that say so
FAULTS = (
    Fault("a barrier removed", r"^\tbar\.sync \t0;$", ""),
    Fault("the guard of a global load removed", r"@%p\d+ (ld\.global)", r"\1"),
    Fault("the guard of a global store removed", r"@%p\d+ (st\.global)", r"\1"),
    Fault("the guard of an atomic removed", r"@%p\d+ (atom\.global)", r"\1"),
    Fault("an exchange of lanes that exchanges nothing", r"(shfl\.sync\.bfly\.b32 \t%r\d+, %r\d+), (\d+),", r"\1, 0,"),
    Fault("a shared store 4 bytes off", r"(st\.shared(?:::cta)?\.b32 \[ %r\d+ \+ )0", r"\g<1>4"),
    Fault("a global store 4 bytes off", r"(st\.global\.b32 \[ %rd\d+ \+ )0", r"\g<1>4"),
    Fault("copies waited for too little", r"cp\.async\.wait_group \t(\d+);", r"cp.async.wait_group \t7;"),
    Fault("matrix products not waited for", r"wgmma\.wait_group\.sync\.aligned (\d+);", r"wgmma.wait_group.sync.aligned 7;"),
)


@dataclass
class Planted:
    """A fault at one of the places where its pattern is, in the first kernel of a run that has so many.

    Attributes:
        number: which of the places, from 0.
        kernel: in which it was planted; ``None``: nowhere.
        place: in the kernel's code, of the instruction that was changed or removed.
        removed: whether it has gone.
        sound: the kernel's instructions without it.
    """

    fault: Fault
    number: int
    kernel: str | None = None
    place: int = -1
    removed: bool = False
    sound: Sequence[Instruction] = ()

    def edit(self, kernel: str, ptx: str) -> str:
        """For :func:`~kernel_lab.ptx.checking.run`."""
        if self.kernel not in (None, kernel):
            return ptx
        places = list(re.finditer(self.fault.pattern, ptx, re.MULTILINE))
        if self.number >= len(places):
            return ptx
        place = places[self.number]
        edited = ptx[: place.start()] + place.expand(self.fault.replacement) + ptx[place.end() :]
        if self.kernel is None:
            self.kernel = kernel
            before, after = decode(ptx).program.instructions, decode(edited).program.instructions
            self.place = next(one.place for one, other in zip(before, after, strict=False) if one.text != other.text)
            self.removed = len(before) != len(after)
            self.sound = before
        return edited

    def separates(self, launch: Launched) -> bool:
        """Whether, without the fault, threads use shared memory before they come to the place, or come there again."""
        if launch.issued[self.place] > launch.issued[0]:
            return True
        used = launch.performed[: self.place].nonzero()[0].tolist()
        return any("shared" in self.sound[i].parts or self.sound[i].family in OF_SHARED_MEMORY for i in used)


@dataclass(frozen=True)
class Verdict:
    """What a planted fault did.

    Attributes:
        kernel: in which it was.
        seen: kinds of findings, ``"wrong result"``, or the error that ended the run; empty if nobody noticed.
        excuse: why nobody could notice, if that is certain: no thread comes there, a guard that was removed is never false,
            or a barrier that was removed comes before all use of shared memory. Otherwise empty.
    """

    fault: Fault
    number: int
    kernel: str
    seen: list[str]
    excuse: str

    def __str__(self) -> str:
        return f"{self.fault.name}, place {self.number} of {self.kernel}"


class Trial:
    """A case in which faults are planted. ``problems`` are those that it has without one."""

    def __init__(self, case: Case, target: str = "sm_90") -> None:
        self.case, self.target = case, target
        self._expected = expected(case)
        sound = run(case, target)
        self._sound, self.problems = sound.launched, self._seen(sound)

    def plant(self, fault: Fault, number: int) -> Verdict | None:
        """Executes the case with a fault in the ``number``-th place; ``None`` where there is no such place."""
        planted = Planted(fault, number)
        try:
            outcome = run(self.case, self.target, edit=planted.edit)
        except ValueError as error:  # the op notices that its kernels cannot be right
            assert planted.kernel is not None
            return Verdict(fault, number, planted.kernel, [str(error)], "")
        if planted.kernel is None:
            return None
        return Verdict(fault, number, planted.kernel, self._seen(outcome), self._excuse(outcome.launched, planted))

    def _seen(self, outcome: Outcome) -> list[str]:
        wrong = not deviation(outcome.tensors, self._expected) <= self.case.tolerance
        return [*outcome.gpu.findings.kinds(), *(["wrong result"] if wrong else [])]

    def _excuse(self, launched: list[Launched], planted: Planted) -> str:
        if planted.removed:
            sound = [launch for launch in self._sound if launch.kernel == planted.kernel]
            return "" if any(map(planted.separates, sound)) else "no shared memory is used before"
        pairs = [
            (int(sound.performed[planted.place]), int(faulty.performed[planted.place]))
            for sound, faulty in zip(self._sound, launched, strict=True)
            if faulty.kernel == planted.kernel and planted.place < len(faulty.performed)
        ]
        if not any(after for _, after in pairs):
            return "no thread comes there"
        if "guard" in planted.fault.name and all(before == after for before, after in pairs):
            return "the guard is never false"
        return ""
