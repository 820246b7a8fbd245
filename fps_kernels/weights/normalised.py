"""Weights that are normalised before they multiply: standardised convolutions, weight norm.

Slice by slice (rows, or channels, or positions of a signal's kernel) the weight that multiplies is ``gain * z`` with
``z = (w - mean) / scale``, of the slice ``w`` that is kept: the mean is 0 and the scale the norm (Salimans & Kingma 2016,
"Weight Normalization", equation 2), or they are the mean and the standard deviation (Qiao et al. 2019, "Micro-Batch Training
with Batch-Channel Normalization and Weight Standardization", section 3.2). The gradient of what is kept follows from that of
what multiplies and two sums over it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels.weights.kinds import WeightKind
from fps_kernels.weights.matrix import MatrixLayout


class Normalisation(NamedTuple):
    """What is done to a weight, slice by slice: its rows or, of a matrix ``[O, C]``, columns that belong together.

    Attributes:
        dim: the weight's dimension that counts slices.
        gain: one number for each slice, in any shape; ``None`` for 1.
        eps: added to the variance.
        standardised: by mean and standard deviation, and not by the norm.
        step: columns from one slice to the next, 0 where slices are rows.
        slices: how many, of columns.
    """

    dim: int
    gain: Tensor | None
    eps: float = 0.0
    standardised: bool = False
    step: int = 0
    slices: int = 0

    def placed(self, layout: MatrixLayout, kind: WeightKind) -> "Normalisation | None":
        """The same of a matrix; ``None`` where the sums that gradients need cannot be had.

        Args:
            layout: how the weight is read as a matrix.
            kind: how it multiplies.
        """
        if layout.row_dims == (self.dim,):
            return None if self.standardised and not kind.ADDS_INPUTS else self
        if self.standardised or layout.blocks > 1 or len(layout.row_dims) > 1:
            return None
        place = layout.column_dims.index(self.dim)
        if not kind.KERNEL_PRODUCTS if place else kind.groups > 1:
            return None
        step = math.prod(layout.sizes[d] for d in layout.column_dims[place + 1 :])
        return self._replace(step=step, slices=layout.sizes[self.dim])

    @property
    def is_of_kernel(self) -> bool:
        """Whether slices are positions of a signal's kernel, and not channels of the input."""
        return self.step == 1 and self.dim > 1

    def place(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The slice of each entry."""
        return columns // self.step % self.slices if self.step else rows

    def spread(self, numbers: Tensor, matrix: Tensor) -> Tensor:
        """One number for each slice, in a shape that goes with the matrix."""
        flat = numbers.reshape(-1).to(matrix.dtype)
        if not self.step:
            return flat.unsqueeze(1)
        return flat.repeat_interleave(self.step).repeat(matrix.shape[1] // (self.step * self.slices)).unsqueeze(0)

    def statistics(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """What is taken off, and what is divided by, for each slice."""
        if self.standardised:
            variance, mean = torch.var_mean(matrix, dim=1, correction=0)
            return mean, (variance + self.eps).sqrt()
        if self.step:
            norm = torch.linalg.vector_norm(matrix.reshape(-1, self.slices, self.step), dim=(0, 2))
        else:
            norm = torch.linalg.vector_norm(matrix, dim=1)
        return torch.zeros_like(norm), norm

    def centred(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """``z``, and what was divided by."""
        mean, scale = self.statistics(matrix)
        return (matrix - self.spread(mean, matrix)) / self.spread(scale, matrix), scale

    def of(self, matrix: Tensor) -> Tensor:
        """What multiplies, of what is kept."""
        z, _ = self.centred(matrix)
        return z if self.gain is None else z * self.spread(self.gain, matrix)

    def gradient(
        self, grad: Tensor, z: Tensor, place: Tensor, scale: Tensor, sums: Tensor | None, products: Tensor, columns: int
    ) -> Tensor:
        """The gradient of entries that are kept.

        Args:
            grad: the gradient of what multiplies, at these entries ``[nnz]``.
            z: at these entries.
            place: the slice of each.
            scale: of every slice.
            sums: of the gradient of what multiplies over every row; only for those that are standardised.
            products: over every slice, of that gradient times ``z``.
            columns: numbers in a row.
        """
        off = z * products[place]
        if sums is not None:
            off = (off + sums[place]) / columns
        factor = 1 / scale if self.gain is None else self.gain.reshape(-1).to(scale.dtype) / scale
        return (grad - off) * factor[place]


Read = tuple[Tensor, Normalisation, tuple[int, ...] | None]  # the weight, and which of its dimensions must be rows, if any


def _read_batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Read | None:
    """A weight ``[1, O, C]`` whose rows are taken for the channels of a batch."""
    whole = input.dim() == 3 and input.shape[0] == 1
    if not whole or not training or running_mean is not None or running_var is not None or bias is not None:
        return None
    return input, Normalisation(0, weight, eps, standardised=True), (1,)


def _read_weight_norm(v: Any, g: Any, dim: int = 0) -> Read:
    """By the norms of slices along one dimension."""
    return v, Normalisation(dim % v.dim(), g), None


NORMALISING: dict[Any, Callable[..., Read | None]] = {F.batch_norm: _read_batch_norm, torch._weight_norm: _read_weight_norm}
