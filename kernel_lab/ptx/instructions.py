"""What a kernel's PTX consists of, once it is read."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

STACK = 1 << 60  # the generic address at which a thread's stack begins


@dataclass(frozen=True)
class Register:
    """One of a thread's registers: its number, and its width in bits (1 for a predicate)."""

    index: int
    width: int


@dataclass(frozen=True)
class Immediate:
    """A number in the text; of a floating-point one the bits."""

    value: int


@dataclass(frozen=True)
class Special:
    """What the hardware tells a thread: ``tid.x``, ``ctaid.y``, ``laneid``, ..."""

    name: str


@dataclass(frozen=True)
class Label:
    """Where a branch goes."""

    name: str


@dataclass(frozen=True)
class Address:
    """In brackets: a register plus bytes; ``base`` is ``None`` at the start of shared memory, or a parameter's name."""

    base: Register | str | None
    offset: int


@dataclass(frozen=True)
class Vector:
    """In braces: registers that are read or written together; ``None`` for one that is dropped."""

    parts: tuple["Register | Immediate | None", ...]


Operand: TypeAlias = Register | Immediate | Special | Label | Address | Vector | None


def _registers(operands: tuple[Operand, ...]) -> Iterator[int]:
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.index
        elif isinstance(operand, Vector):
            yield from _registers(operand.parts)
        elif isinstance(operand, Address) and isinstance(operand.base, Register):
            yield operand.base.index


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with all its suffixes, such as ``"ld.global.v4.b32"``.
        operands: the destination first.
        guard: the predicate under which a thread does it, or ``None``.
        negated: whether it does so where the predicate is false.
        where: the line of Python that it comes from, ``"file.py:line"``.
        text: as it was read, in one line.
        place: its number in the kernel.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    where: str
    text: str
    place: int = -1

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The opcode and its suffixes, without qualifiers such as ``::cta``."""
        return tuple(re.sub(r"::\w+", "", self.opcode).split("."))

    @property
    def family(self) -> str:
        return self.parts[0]

    @cached_property
    def touched(self) -> frozenset[int]:
        """The registers that it reads or writes."""
        return frozenset(_registers((*self.operands, self.guard)))

    @cached_property
    def written(self) -> frozenset[int]:
        """The registers that it writes."""
        reads_only = self.family in ("st", "red", "cp", "stmatrix", "bra", "bar", "wgmma") or not self.operands
        return frozenset() if reads_only else frozenset(_registers(self.operands[:1]))

    @property
    def ends_block(self) -> bool:
        return self.family in ("bra", "ret", "exit")

    @property
    def goes_on(self) -> bool:
        """Whether a thread may come to the next instruction."""
        return not self.ends_block or self.guard is not None


@dataclass
class Program:
    """A kernel.

    Attributes:
        labels: the number of the instruction that each is before.
        widths: of the registers, in bits.
        parameters: name and type of each, in order.
        stack: bytes of stack per thread.
    """

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]
    widths: list[int]
    parameters: list[tuple[str, str]]
    stack: int = 0
