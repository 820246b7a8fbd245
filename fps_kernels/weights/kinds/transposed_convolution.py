"""Transposed convolutions: a weight ``[C_in, O, ...]``, whose numbers send an input channel to an output channel each."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels import ops
from fps_kernels.weights.kinds.convolution import numbers, row_products
from fps_kernels.weights.kinds.kind import Call, WeightKind

NAME = "F.conv_transpose2d"
SCORED = True
DIMENSIONS = (3, 4)


@dataclass(frozen=True)
class TransposedConvolution(WeightKind):
    """Every position of the images ``[B, C_in, ...]`` is spread by a kernel over the output's channel.

    Its gradient is that of a convolution in which the gradient of the output is the image, and the input what a convolution
    gave.

    Attributes:
        kernel: its size in each dimension.
        stride: positions of the output between those of two neighbours of the input.
        padding: positions that the output is cut by, at both ends.
        output_padding: positions that it is extended by, at the end.
        dilation: positions between those of two neighbours in the kernel.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self.kernel) + 2 else x.unsqueeze(0)

    def input_rows(self, x: Tensor) -> int:
        images = self._batched(x)
        return images.shape[0] * math.prod(images.shape[2:])

    def add_column_norms_(self, x: Tensor, norm: Tensor, ord: float) -> None:
        images = self._batched(x)
        own = norm.view(images.shape[1], math.prod(self.kernel))
        for place, offset in enumerate(itertools.product(*map(range, self.kernel))):
            reached = images
            for d, position in enumerate(offset):
                begin, stop = self._reaches(d, position, images.shape[d + 2])
                reached = reached.narrow(d + 2, begin, stop - begin)
            if reached.numel():
                column = own[:, place].contiguous()
                ops.column_norm_(reached.movedim(1, -1).flatten(0, -2), column, ord)
                own[:, place] = column

    def _reaches(self, d: int, offset: int, size: int) -> tuple[int, int]:
        """Positions of the input that a number of the kernel sends to some position of the output."""
        length = (size - 1) * self.stride[d] - 2 * self.padding[d] + self.dilation[d] * (self.kernel[d] - 1)
        last = length + self.output_padding[d]  # of the output's positions
        shift = offset * self.dilation[d] - self.padding[d]
        first = max(0, -(shift // self.stride[d]))
        stop = min(size, (last - shift) // self.stride[d] + 1)
        return min(first, size), max(min(first, size), stop)

    def channel_dim(self, x: Tensor) -> int | None:
        return x.dim() - len(self.kernel) - 1

    def sampled_gradient(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        images, outputs = self._batched(x), self._batched(gy)
        neurons, channels, size = row_offsets.numel() - 1, images.shape[1], math.prod(self.kernel)
        lengths, every = row_offsets.diff().long(), torch.arange(neurons, device=columns.device)
        neuron = torch.repeat_interleave(every, lengths, output_size=columns.numel())
        channel, place = columns.long() // size, columns.long() % size
        # Rows of that convolution's weight are the input's channels, its columns what is sent where.
        own = (channel * neurons + neuron) * size + place
        order = own.argsort()
        counts = torch.zeros(channels + 1, dtype=torch.int64, device=columns.device)
        counts[1:].scatter_add_(0, channel, torch.ones_like(channel))
        sizes = [1] * (2 - len(self.kernel))
        geometry = [(*sizes, *self.kernel), (*sizes, *self.stride)]
        dilation = (*sizes, *self.dilation)
        above, left = (*(0 for _ in sizes), *self.padding)
        inner = (own % (neurons * size))[order].int()
        grad = ops.sampled_grad_conv2d(
            _planes(images),
            _planes(outputs),
            counts.cumsum(0).int(),
            inner,
            *geometry,
            (above, above, left, left),
            dilation,
            1,
        )
        return torch.empty_like(grad).index_copy_(0, order, grad)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        function = _TRANSPOSED[len(self.kernel)]
        return function(x, weight, None, self.stride, self.padding, self.output_padding, 1, self.dilation)

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        function = _STRAIGHT[len(self.kernel)]
        gx: Tensor = function(gy, weight.to(gy.dtype), None, self.stride, self.padding, self.dilation)
        return gx.reshape(shape)

    def row_products(self, gy: Tensor, y: Tensor) -> Tensor:
        return row_products(self._batched(gy), self._batched(y))

    def bias_gradient(self, gy: Tensor, shape: torch.Size) -> Tensor:
        gy = self._batched(gy)
        return gy.sum([d for d in range(gy.dim()) if d != 1])


def _planes(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` of a batch of images or of signals."""
    return x if x.dim() == 4 else x.unsqueeze(2)


_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d}
_STRAIGHT = {1: F.conv1d, 2: F.conv2d}


def read(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Call | None:
    """``None`` for one with groups, or with more padding of the output than a step is long."""
    dims = weight.dim() - 2
    steps, cut, extended, spread = (numbers(value, dims) for value in (stride, padding, output_padding, dilation))
    if groups != 1 or any(more >= step for more, step in zip(extended, steps, strict=True)):
        return None
    kernel = tuple(int(n) for n in weight.shape[2:])
    return Call(weight, input, (bias,), TransposedConvolution(kernel, steps, cut, extended, spread), (1,))


FUNCTIONS = dict.fromkeys(
    (
        F.conv_transpose1d,
        F.conv_transpose2d,
        torch.ops.aten.conv_transpose1d.default,
        torch.ops.aten.conv_transpose2d.input,
    ),
    read,
)
