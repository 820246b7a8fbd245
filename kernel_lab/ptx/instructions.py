"""What a kernel's PTX consists of, once it is read."""

import re
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
