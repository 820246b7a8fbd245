"""Every weight as a matrix: rows are output neurons, columns are what each neuron multiplies.

A linear weight is one already. Of any other, some dimensions count the neurons and the rest what these multiply: of a
convolution's ``[O, C/groups, kh, kw]`` the first, of a Hugging Face ``Conv1D``'s ``[C, O]`` the second, of the experts of a
mixture, ``[E, O, C]`` or ``[E, C, O]``, two. One class knows how to turn a parameter into its matrix and back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fps_kernels import ops
from fps_kernels.ops.transfers import sent
from fps_kernels.storage.checked_file import whole_number, whole_numbers


class MatrixMemory(NamedTuple):
    """A parameter's own memory, in which the numbers of its matrix can be found and written.

    Attributes:
        view: two-dimensional, with a row for every row of the matrix.
        positions: int32 ``[C]``: where a column of the matrix is in the view; ``None`` where it is.
        jumps: int32 ``[O]``: how much further that is in a row; ``None`` for nothing.
    """

    view: Tensor
    positions: Tensor | None
    jumps: Tensor | None


@dataclass(frozen=True)
class MatrixLayout:
    """How a parameter is read as a matrix ``[O, C]``.

    Attributes:
        parameter_shape: shape of the parameter itself.
        row_dims: the dimensions that count output neurons, ascending; the others count columns.
        blocks: into so many equal ones the first dimension is split before dimensions are counted: the experts of a mixture
            that are stacked in a matrix.
    """

    parameter_shape: tuple[int, ...]
    row_dims: tuple[int, ...] = (0,)
    blocks: int = 1

    @classmethod
    def described(cls, said: Any) -> "MatrixLayout":
        """From what a file says, which is what :meth:`description` said.

        Raises:
            ValueError: a shape, or dimensions, that no weight has.
        """
        if not isinstance(said, list) or len(said) != 3:
            raise ValueError(f"a layout is {said!r}")
        sizes, rows, blocks = whole_numbers(said[0]), whole_numbers(said[1]), whole_number(said[2], 1)
        found = cls(sizes, rows, blocks)
        ascending = list(rows) == sorted({*rows})
        if not sizes or not rows or not ascending or sizes[0] % blocks or rows[-1] >= len(found.sizes):
            raise ValueError(f"its shape is {said[0]!r}, with rows along {said[1]!r} and {blocks} blocks")
        return found

    def description(self) -> list[Any]:
        """For a file."""
        return [list(self.parameter_shape), list(self.row_dims), self.blocks]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The parameter's dimensions, the first one split into blocks."""
        shape = self.parameter_shape
        return shape if self.blocks == 1 else (self.blocks, shape[0] // self.blocks, *shape[1:])

    @cached_property
    def column_dims(self) -> tuple[int, ...]:
        """The dimensions that count columns, ascending."""
        return tuple(d for d in range(len(self.sizes)) if d not in self.row_dims)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """``(O, C)``."""
        if not self.sizes:
            return 1, 1
        return math.prod(self.sizes[d] for d in self.row_dims), math.prod(self.sizes[d] for d in self.column_dims)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the parameter is the matrix itself."""
        return len(self.parameter_shape) == 2 and self.row_dims == (0,)

    @property
    def columns_per_channel(self) -> int:
        """Columns that belong to one channel of the input: the size of a convolution's kernel, 1 for a linear map."""
        return math.prod(self.sizes[d] for d in self.column_dims[1:])

    def matrix(self, parameter: Tensor) -> Tensor:
        """``[O, C]``: a view of the parameter, or a copy where its memory format allows none (channels-last)."""
        return self._permuted(parameter.detach()).reshape(self.shape)

    def matrices(self, parameter: Tensor) -> list[Tensor]:
        """:meth:`matrix` in blocks of rows, where these are views and the whole would be a copy: experts of a mixture."""
        permuted = self._permuted(parameter.detach())
        if _as_view(permuted, self.shape) is None and len(self.row_dims) > 1:
            shape = self.shape[0] // self.sizes[self.row_dims[0]], self.shape[1]
            blocks = [_as_view(block, shape) for block in permuted.unbind(0)]
            if all(block is not None for block in blocks):
                return [block for block in blocks if block is not None]
        return [permuted.reshape(self.shape)]

    def memory(self, parameter: Tensor) -> MatrixMemory:
        """The parameter's memory.

        Raises:
            ValueError: strides that allow no view.
        """
        permuted = self._permuted(parameter.detach())
        view = _as_view(permuted, self.shape)
        if view is not None:
            return MatrixMemory(view, None, None)
        sizes, strides = self.sizes, self.strides(parameter)
        if any(n > 1 and s == 0 for n, s in zip(sizes, strides, strict=True)):
            raise ValueError(f"strides {strides} allow no view as a matrix: make it contiguous")
        starts, positions = (
            _addresses([(sizes[d], strides[d]) for d in dims]) for dims in (self.row_dims, self.column_dims)
        )
        step = strides[self.row_dims[-1]]
        jumps = starts - torch.arange(self.shape[0], device="cpu") * step
        width = int(positions.max() + jumps.max()) + 1
        if int(jumps.min()) < 0 or (self.shape[0] - 1) * step + width - 1 > int(starts.max() + positions.max()):
            raise ValueError(f"strides {strides} allow no view as a matrix: make it contiguous")
        if width > ops.MAX_NNZ:
            raise ValueError(f"its {math.prod(sizes)} numbers are more than 32 bits can count in this order of dimensions")
        view = parameter.detach().as_strided((self.shape[0], width), (step, 1))
        where = sent(positions.int(), parameter.device)
        return MatrixMemory(view, where, sent(jumps.int(), parameter.device) if bool(jumps.any()) else None)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`: ``[O, C]`` in the shape of the parameter."""
        if self.row_dims == (0,) and self.blocks == 1:
            return matrix.reshape(self.parameter_shape)
        order = (*self.row_dims, *self.column_dims)
        split = matrix.reshape([self.sizes[d] for d in order]).permute(_inverse(order))
        return split if self.blocks == 1 else split.flatten(0, 1)

    def strides(self, parameter: Tensor) -> tuple[int, ...]:
        """The parameter's strides, in the dimensions of :attr:`sizes`."""
        own = parameter.stride()
        return own if self.blocks == 1 else (own[0] * self.sizes[1], *own)

    def _permuted(self, parameter: Tensor) -> Tensor:
        if self.blocks > 1:
            parameter = parameter.unflatten(0, self.sizes[:2])
        return parameter if self.row_dims == (0,) else parameter.permute(*self.row_dims, *self.column_dims)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _as_view(tensor: Tensor, shape: tuple[int, int]) -> Tensor | None:
    try:
        return tensor.view(shape)
    except (RuntimeError, ValueError):  # the latter of a simulated one
        return None


def _addresses(dims: list[tuple[int, int]]) -> Tensor:
    """Where numbers lie that are counted by dimensions of these sizes and strides: int64, from 0."""
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in dims:
        found = (found.unsqueeze(1) + torch.arange(size, device="cpu") * stride).flatten()
    return found


def is_simulated(tensor: Tensor) -> bool:
    """Whether a tensor has no values to look at (``FakeTensorMode``, used to measure memory without allocating it)."""
    return isinstance(tensor, FakeTensor)


def unfit(parameter: Tensor) -> str | None:
    """Why no entries of a parameter can be chosen or tuned, whatever it multiplies; ``None`` if they can."""
    if parameter.dtype not in ops.FLOAT_DTYPES:
        return f"its dtype is {parameter.dtype}, not float32, bfloat16 or float16"
    if parameter.layout != torch.strided:
        return f"its layout is {parameter.layout}, not strided"
    if computes_its_numbers(parameter):
        return f"it is a {type(parameter).__name__}, not a plain tensor"
    return None


def computes_its_numbers(tensor: Tensor) -> bool:
    """Whether a tensor computes its numbers, as quantised and distributed ones do: it has no memory to read or to write."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_simulated(tensor)
