"""Views of a weight: which rows of which matrix an argument of a multiplication is.

Models slice, transpose and reshape their weights before they multiply by them. Whatever the steps were, a view is told by
where its numbers lie in the weight: sizes, strides, and where it begins. Calibration finds views in the weight's memory,
attached weights hand on what they are; both ask here.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from fps_kernels.weights.matrix import MatrixLayout

# Functions that give a copy of a weight in another dtype or memory format, to multiply by in its place.
CASTS = frozenset((Tensor.to, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.contiguous))

_Dims = list[tuple[int, int]]  # sizes and strides


class Part(NamedTuple):
    """Where the numbers of a view lie in a weight, or those of a copy that stands for such a view.

    Attributes:
        sizes: of the view.
        strides: in numbers of the weight's memory.
        offset: from the weight's first number.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def whole(cls, weight: Tensor) -> "Part":
        """All of a weight."""
        return cls(tuple(weight.shape), weight.stride())

    def of(self, weight: Tensor) -> Tensor:
        """The view, of a tensor that lies in memory as the weight does."""
        shape, strides = tuple(weight.shape), weight.stride()
        if self == Part(shape, strides):
            return weight
        if len(shape) == 2 and self == Part(shape[::-1], strides[::-1]):
            return weight.t()
        if self.strides == strides and self.sizes[1:] == shape[1:] and strides[0] and self.offset % strides[0] == 0:
            return weight.narrow(0, self.offset // strides[0], self.sizes[0])
        return weight.as_strided(self.sizes, self.strides, weight.storage_offset() + self.offset)

    def within(self, copy: "Part", origin: "Part") -> "Part | None":
        """Where a view of a copy has its numbers in the weight.

        Args:
            copy: where the copy has its own numbers, of the copy's memory.
            origin: where the weight has what was copied; it has the copy's sizes.

        Returns:
            ``None`` where a dimension of the view runs over several of the copy, which may lie apart in the weight.
        """
        if copy.strides == origin.strides:
            return self._replace(offset=self.offset + origin.offset)
        dims = sorted((s, n, o) for n, s, o in zip(copy.sizes, copy.strides, origin.strides, strict=True) if n > 1)[::-1]
        strides, rest, offset = [], self.offset, origin.offset
        for size, stride in zip(self.sizes, self.strides, strict=True):
            found = next(
                (o * (stride // s) for s, n, o in dims if stride >= s and stride % s == 0 and (size - 1) * stride < n * s),
                None,
            )
            if found is None and size > 1:
                return None
            strides.append(found or 0)
        for s, _, o in dims:
            offset += rest // s * o
            rest %= s
        return Part(self.sizes, tuple(strides), offset)


class Rows(NamedTuple):
    """A half-open range of rows of a weight's matrix.

    Attributes:
        layout: how the weight is read as a matrix.
        first: the first row.
        stop: behind the last one.
    """

    layout: MatrixLayout
    first: int
    stop: int

    @property
    def range(self) -> tuple[int, int] | None:
        """``(first, stop)``, or ``None`` for all."""
        return None if (self.first, self.stop) == (0, self.layout.shape[0]) else (self.first, self.stop)


def part_of(view: Tensor, weight: Tensor) -> Part | None:
    """Where a tensor has its numbers that may lie in a weight's memory; ``None`` if it does not."""
    if view.dtype != weight.dtype or not in_same_memory(view, weight):
        return None
    return Part(tuple(view.shape), view.stride(), int(view.storage_offset()) - int(weight.storage_offset()))


def in_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    try:
        return int(a.untyped_storage()._cdata) == int(b.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse and opaque ones
        return False


def rows_of(part: Part, row_dims: tuple[int, ...], weight: Tensor) -> Rows | None:
    """Which rows of a weight's matrix a view of it is, if the view's dimensions ``row_dims`` count output neurons.

    Args:
        part: the view.
        row_dims: some of its dimensions; the others count what each neuron multiplies.
        weight: the weight.

    Returns:
        ``None`` where they are no range of whole rows: some inputs only, every other neuron, neurons in another order.
    """
    return _rows_of(part, row_dims, tuple(weight.shape), weight.stride())


@lru_cache(maxsize=4096)
def _rows_of(part: Part, row_dims: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...]) -> Rows | None:
    if not all(part.sizes) or not all(shape):
        return None
    column_dims = tuple(d for d in range(len(part.sizes)) if d not in row_dims)
    rows, columns = _merged(part.sizes, part.strides, row_dims), _merged(part.sizes, part.strides, column_dims)
    inputs = math.prod(part.sizes[d] for d in column_dims)
    for layout in _layouts(shape, inputs):
        own = strides if layout.blocks == 1 else (strides[0] * layout.sizes[1], *strides)
        if columns == _merged(layout.sizes, own, layout.column_dims):
            found = _range(rows, part.offset, _merged(layout.sizes, own, layout.row_dims))
            if found is not None:
                return Rows(layout, *found)
    return None


def _layouts(shape: tuple[int, ...], inputs: int) -> Iterator[MatrixLayout]:
    """Ways to read a weight as a matrix of so many columns, the usual one first."""
    for row_dims in ((0,), (1,), (0, 1), (0, 2), (1, 2), (2,)):
        if row_dims[-1] < len(shape) and len(row_dims) < len(shape):
            yield MatrixLayout(shape, row_dims)
    if len(shape) == 2 and inputs < shape[0] and shape[0] % inputs == 0:  # transposed matrices, one below the other
        yield MatrixLayout(shape, (0, 2), shape[0] // inputs)


def _merged(sizes: tuple[int, ...], strides: tuple[int, ...], dims: tuple[int, ...]) -> _Dims:
    """Dimensions of more than one number, those made one that step through memory as one."""
    found: _Dims = []
    for d in dims:
        if sizes[d] == 1:
            continue
        if found and found[-1][1] == sizes[d] * strides[d]:
            found[-1] = found[-1][0] * sizes[d], strides[d]
        else:
            found.append((sizes[d], strides[d]))
    return found


def _range(rows: _Dims, offset: int, own: _Dims) -> tuple[int, int] | None:
    """The range of the rows counted by ``own`` that those counted by ``rows`` are, which begin at ``offset``."""
    fixed = len(own) - len(rows)
    if fixed < 0 or any(inner >= outer for (_, outer), (_, inner) in pairwise(own)):
        return None
    if rows and (rows[1:] != own[fixed + 1 :] or rows[0][1] != own[fixed][1]):
        return None
    first, stop = 0, 1
    for i, (size, stride) in enumerate(own):  # of which all up to the first of `rows` are where the view begins
        index = offset // stride if i <= fixed else 0
        count = 1 if i < fixed else rows[i - fixed][0]
        if index < 0 or index + count > size:
            return None
        offset -= index * stride
        first, stop = first * size + index, (stop - 1) * size + index + count
    return (first, stop) if offset == 0 else None
