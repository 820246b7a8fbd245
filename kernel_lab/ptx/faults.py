"""Faults that are planted in the PTX of kernels, one at a time: what the machine must see."""

import re
from dataclasses import dataclass

from kernel_lab.ptx.cases import Case
from kernel_lab.ptx.checking import Outcome, deviation, expected, run
from kernel_lab.ptx.decoding import decode
from kernel_lab.ptx.machine import Launched


@dataclass(frozen=True)
class Fault:
    """A mistake that a compiler, or a hand, could make: a place in the PTX, and what it becomes."""

    name: str
    pattern: str
    replacement: str


FAULTS = (
    Fault("a barrier removed", r"^\tbar\.sync \t0;$", ""),
    Fault("the guard of a global load removed", r"@%p\d+ (ld\.global)", r"\1"),
    Fault("the guard of a global store removed", r"@%p\d+ (st\.global)", r"\1"),
    Fault("the guard of an atomic removed", r"@%p\d+ (atom\.global)", r"\1"),
    Fault("an exchange of lanes that exchanges nothing", r"(shfl\.sync\.bfly\.b32 \t%r\d+, %r\d+), (\d+),", r"\1, 0,"),
    Fault("a shared store 4 bytes off", r"(st\.shared::cta\.b32 \[ %r\d+ \+ )0", r"\g<1>4"),
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
        instruction: the place in the kernel's code that was changed; -1 where instructions have gone.
    """

    fault: Fault
    number: int
    kernel: str | None = None
    instruction: int = -1

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
            self.kernel, self.instruction = kernel, _changed(ptx, edited)
        return edited


def _changed(ptx: str, edited: str) -> int:
    before, after = decode(ptx).program.instructions, decode(edited).program.instructions
    if len(before) != len(after):
        return -1
    return next(one.place for one, other in zip(before, after, strict=True) if one.text != other.text)


@dataclass(frozen=True)
class Verdict:
    """What a planted fault did.

    Attributes:
        kernel: in which it was.
        seen: kinds of findings, ``"wrong result"``, or the error that ended the run; empty if nobody noticed.
        changes_nothing: whether no thread ever did anything else than without the fault: nobody came there, or a guard that
            was removed is never false.
    """

    fault: Fault
    number: int
    kernel: str
    seen: list[str]
    changes_nothing: bool

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
            return Verdict(fault, number, planted.kernel, [str(error)], False)
        if planted.kernel is None:
            return None
        same = planted.instruction >= 0 and self._unchanged(outcome.launched, planted)
        return Verdict(fault, number, planted.kernel, self._seen(outcome), same)

    def _seen(self, outcome: Outcome) -> list[str]:
        wrong = not deviation(outcome.tensors, self._expected) <= self.case.tolerance
        return [*outcome.gpu.findings.kinds(), *(["wrong result"] if wrong else [])]

    def _unchanged(self, launched: list[Launched], planted: Planted) -> bool:
        """Whether as many threads did the changed instruction as before, or none where it does something else now."""
        place, guard = planted.instruction, "guard" in planted.fault.name
        for sound, faulty in zip(self._sound, launched, strict=True):
            if faulty.kernel == planted.kernel and place < len(faulty.performed):
                before, after = int(sound.performed[place]), int(faulty.performed[place])
                if before != after or (after and not guard):
                    return False
        return True
