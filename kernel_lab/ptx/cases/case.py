"""A call of an op that is executed, and the tensors that it is made of."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fps_kernels.ops.records import Csr
from fps_kernels.ops.reference import entry_rows

FP32, BF16, FP16, FP64, INT32 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32
DTYPES = (FP32, BF16, FP16)
SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
INFINITY = float("inf")
SUM_BOUND = 1e-5  # of sums, relative to the largest number of the result
SECTOR = 32  # bytes

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Op:
    """What is executed, and what it should give.

    Attributes:
        prepare: of the arguments a call, which may be made again; within it kernels are launched.
        reference: of the same arguments what :mod:`fps_kernels.ops.reference` makes of them.
    """

    prepare: Callable[..., Callable[[], object]]
    reference: Callable[..., object]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        op: its name.
        name: the shapes and what is special about them.
        dtype: of the weight, or of the input.
        build: makes the arguments, all random numbers by torch.
        least: of the arguments the bytes that the op as designed must move: what it reads of them and writes to them and to
            its results. What goes from one launch to the next comes on top, as it is seen.
        elements: of the arguments the number of elements that the op goes through.
        tolerance: of what the op returns or changes, relative to the largest number of each tensor; 0: the same bits.
        forced: constants of the Triton backend that have another value, ``"module.NAME"``.
        lane: whether it is one of those that the test suite executes.
        large: whether it is there for its traffic: one order of programs is enough.
    """

    op: str
    name: str
    dtype: torch.dtype
    build: Callable[[], Arguments]
    least: Callable[[Arguments], int]
    elements: Callable[[Arguments], int]
    tolerance: float = 0.0
    forced: Mapping[str, object] = field(default_factory=dict)
    lane: bool = False
    large: bool = False

    def __str__(self) -> str:
        return f"{self.op} {SHORT[self.dtype]} {self.name}"


def call(function: Callable[..., object]) -> Callable[..., Callable[[], object]]:
    """:attr:`Op.prepare` of a plain function."""
    return lambda *arguments: lambda: function(*arguments)


def tensors_of(things: object) -> Iterator[Tensor]:
    """All of them in lists, tuples and records, in order."""
    if isinstance(things, Tensor):
        yield things
    elif isinstance(things, list | tuple):
        for thing in things:
            yield from tensors_of(thing)
    elif isinstance(things, Csr):
        yield from (things.row_offsets, things.columns)


def size(*tensors: Tensor) -> int:
    """Bytes of their elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape).to(dtype)


LAYOUTS = ("rows", "transposed", "strided", "padded", "offset", "repeated")


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str) -> Tensor:
    """``[rows, columns]`` in one of :data:`LAYOUTS`.

    ``padded`` ones have rows further apart than they are long, and everything is divisible by 16; the rows of ``offset``
    ones begin one element after such an address; all rows of ``repeated`` ones are one.
    """
    if layout == "rows":
        return randn(rows, columns, dtype=dtype)
    if layout == "transposed":
        return randn(columns, rows, dtype=dtype).t()
    if layout == "strided":
        return randn(rows + 1, 3 * columns + 1, dtype=dtype)[1:, 1::3]
    if layout == "padded":
        return randn(rows, -(-columns // 16) * 16 + 16, dtype=dtype)[:, :columns]
    if layout == "offset":
        return randn(rows * columns + 1, dtype=dtype)[1:].view(rows, columns)
    if layout == "repeated":
        return randn(1, columns, dtype=dtype).expand(rows, columns)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def csr(rows: int, columns: int, entries: int, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """``(row_offsets, columns)`` of about so many random entries; a third of the rows is empty, unless ``per_row``: then
    all have about as many."""
    if per_row:
        row = torch.arange(entries) % rows
    else:
        filled = torch.rand(rows) > 0.3
        filled[0], filled[-1] = False, True
        allowed = filled.nonzero().flatten()
        row = allowed[torch.randint(len(allowed), (entries,))]
    cells = torch.unique(row * columns + torch.randint(columns, (entries,)))
    row_offsets = torch.zeros(rows + 1, dtype=INT32)
    row_offsets[1:] = torch.bincount(cells // columns, minlength=rows).cumsum(0)
    return row_offsets, (cells % columns).to(INT32)


def at_entries(W: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
    """The selected entries of a matrix, ``[nnz]``."""
    return W[entry_rows(row_offsets), columns.long()]
