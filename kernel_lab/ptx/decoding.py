"""Every instruction of a kernel as a function, found once and used by all its launches."""

from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import NamedTuple

from kernel_lab.ptx import (
    arithmetic,
    copies,
    exchanges,
    global_access,
    matrices,
    moves,
    shared_access,
    stack,
    warpgroups,
)
from kernel_lab.ptx.batch import Batch
from kernel_lab.ptx.instructions import Immediate, Instruction, Label, Program
from kernel_lab.ptx.operands import Mask, Step
from kernel_lab.ptx.parsing import parse

FAMILIES: tuple[Callable[[Instruction], Step | None], ...] = (
    moves.decode,
    copies.decode,
    warpgroups.decode,
    matrices.decode,
    global_access.decode,
    shared_access.decode,
    stack.decode,
    exchanges.decode,
    arithmetic.decode,
)


class Flow(Enum):
    """Where an instruction leads."""

    NEXT = "next"
    BRANCH = "branch"
    BARRIER = "barrier"
    RETURN = "return"


class Decoded(NamedTuple):
    """An instruction that can be run.

    Attributes:
        instruction: as it was read.
        step: what it does, where it leads to the next one.
        guard: the register of the predicate, or ``None``.
        negated: whether it is done where the predicate is false.
        target: of a branch, the number of the instruction.
    """

    flow: Flow
    instruction: Instruction
    step: Step
    guard: int | None
    negated: bool
    target: int


class Code(NamedTuple):
    """A kernel that can be run."""

    program: Program
    instructions: list[Decoded]


@cache
def decode(ptx: str) -> Code:
    """The kernel in a PTX text.

    Raises:
        ValueError: the text is not understood.
        NotImplementedError: an instruction is not known; the message is the instruction.
    """
    program = parse(ptx)
    return Code(program, [_decode(instruction, program.labels) for instruction in program.instructions])


def _nothing(batch: Batch, active: Mask | None) -> None:
    """What fences do to a machine in which every write is seen at once."""


def _decode(instruction: Instruction, labels: dict[str, int]) -> Decoded:
    flow, target = Flow.NEXT, -1
    step: Step = _nothing
    if instruction.family == "bra":
        (label,) = instruction.operands
        assert isinstance(label, Label)
        flow, target = Flow.BRANCH, labels[label.name]
    elif instruction.opcode in ("bar.sync", "barrier.sync") and instruction.operands == (Immediate(0),):
        flow = Flow.BARRIER
    elif instruction.family in ("ret", "exit"):
        flow = Flow.RETURN
    elif instruction.family not in ("fence", "membar") and instruction.opcode != "bar.warp.sync":
        step = _step(instruction)
    if flow in (Flow.BARRIER, Flow.RETURN) and instruction.guard is not None:
        raise NotImplementedError(instruction.text)
    guard = None if instruction.guard is None else instruction.guard.index
    return Decoded(flow, instruction, step, guard, instruction.negated, target)


def _step(instruction: Instruction) -> Step:
    for decode_family in FAMILIES:
        if (step := decode_family(instruction)) is not None:
            return step
    raise NotImplementedError(instruction.text)
