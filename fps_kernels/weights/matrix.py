"""Every weight as a matrix: rows are output neurons, columns are what each neuron multiplies.

A linear weight is one already, a convolution's ``[O, C/groups, kh, kw]`` is its ``[O, C/groups * kh * kw]`` view, and a
Hugging Face ``Conv1D`` keeps its weight transposed. One class knows how to turn a parameter into its matrix and back.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fps_kernels import ops
from fps_kernels.ops.transfers import sent
from fps_kernels.storage.checked_file import whole_numbers


@dataclass(frozen=True)
class MatrixLayout:
    """How a parameter is read as a matrix ``[O, C]``.

    Attributes:
        parameter_shape: shape of the parameter itself.
        transposed: the parameter is ``[C, O]`` (Hugging Face ``Conv1D``).
    """

    parameter_shape: tuple[int, ...]
    transposed: bool = False

    @classmethod
    def described(cls, shape: Any, transposed: Any) -> "MatrixLayout":
        """From what a file says.

        Raises:
            ValueError: a shape that no weight has.
        """
        sizes = whole_numbers(shape)
        if not sizes or type(transposed) is not bool or (transposed and len(sizes) != 2):
            raise ValueError(f"its shape is {shape!r}, transposed: {transposed!r}")
        return cls(sizes, transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, C)``."""
        if self.transposed:
            return self.parameter_shape[1], self.parameter_shape[0]
        return (self.parameter_shape[0] if self.parameter_shape else 1), math.prod(self.parameter_shape[1:])

    @property
    def columns_per_channel(self) -> int:
        """Columns that belong to one channel of the input: the size of a convolution's kernel, 1 for a linear map."""
        return math.prod(self.parameter_shape[2:])

    def matrix(self, parameter: Tensor) -> Tensor:
        """``[O, C]``: a view of the parameter, or a copy where its memory format allows none (channels-last)."""
        parameter = parameter.detach()
        return parameter.t() if self.transposed else parameter.reshape(self.shape)

    def writable_matrix(self, parameter: Tensor) -> tuple[Tensor, Tensor | None]:
        """A view ``[O, C]`` of the parameter's memory, and where its columns lie in it.

        Returns:
            The view, and ``None`` where its columns are the matrix's own, or an int32 ``[C]`` that maps a column of the
            matrix to a column of the view (channels-last convolutions).

        Raises:
            ValueError: strides that allow no such view.
        """
        parameter = parameter.detach()
        if self.transposed:
            return parameter.t(), None
        try:
            return parameter.view(self.shape), None
        except (RuntimeError, ValueError):  # the latter of a simulated one
            columns = self.shape[1]
            order = sorted(range(1, parameter.dim()), key=parameter.stride, reverse=True)
            try:
                view = parameter.permute(0, *order).view(self.shape)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"strides {parameter.stride()} allow no view as a matrix: make it contiguous") from error
            every = torch.arange(columns, dtype=torch.int32, device="cpu")
            position = torch.empty_like(every)
            position[every.view(parameter.shape[1:]).permute([d - 1 for d in order]).flatten().long()] = every
            return view, sent(position, parameter.device)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`: ``[O, C]`` in the shape of the parameter."""
        return matrix.t() if self.transposed else matrix.reshape(self.parameter_shape)


def is_simulated(tensor: Tensor) -> bool:
    """Whether a tensor has no values to look at (``FakeTensorMode``, used to measure memory without allocating it)."""
    return isinstance(tensor, FakeTensor)


def unfit(parameter: Tensor) -> str | None:
    """Why no entries of a parameter can be chosen or tuned, whatever it multiplies; ``None`` if they can."""
    if parameter.dtype not in ops.FLOAT_DTYPES:
        return f"its dtype is {parameter.dtype}, not float32, bfloat16 or float16"
    if parameter.layout != torch.strided:
        return f"its layout is {parameter.layout}, not strided"
    # Quantised and distributed tensors compute their values: there is no memory of theirs to read or to write.
    if type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_simulated(parameter):
        return f"it is a {type(parameter).__name__}, not a plain tensor"
    return None
