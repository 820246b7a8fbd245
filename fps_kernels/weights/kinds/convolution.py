"""Convolutions: a weight ``[O, C_in / groups, ...]`` whose last dimensions are a kernel's, of signals, images or volumes.

The ops know images. A signal is an image of one line. Of a volume ``[B, C, T, H, W]`` every output frame is a convolution of
images that have the frames which the kernel covers as further channels, ``[B * T_out, C * kt, H, W]``: in that order the
weight's columns are those of ``[O, C * kt, kh, kw]``.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops import Convolution
from fps_kernels.weights.kinds.kind import Call, WeightKind, directly

NAME = "F.conv2d"
SCORED = True
DIMENSIONS = (3, 4, 5)


@dataclass(frozen=True)
class Convolution2d(WeightKind):
    """A kernel of every output channel slides over the images ``[B, C_in, H, W]``, or over one ``[C_in, H, W]``.

    Attributes:
        geometry: kernel, stride, padding, dilation and groups.
    """

    ADDS_INPUTS = True
    geometry: Convolution

    @property
    def groups(self) -> int:
        return self.geometry.groups

    def input_rows(self, x: Tensor) -> int:
        images = _batched(x)
        return images.shape[0] * math.prod(self.geometry.output_size(images))

    def add_column_norms_(self, x: Tensor, norm: Tensor, ord: float) -> None:
        directly(ops.column_norm_conv2d_, x)(_batched(x), norm, *self.geometry, ord)

    def channel_dim(self, x: Tensor) -> int | None:
        return x.dim() - 3 if self.geometry.groups == 1 else None

    def sampled_gradient(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        grad: Tensor = ops.sampled_grad_conv2d(_batched(gy), _batched(x), row_offsets, columns, *self.geometry)
        return grad

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        images, padding = _batched(x), self._even_padding()
        if padding is None:
            top, bottom, left, right = self.geometry.padding
            images, padding = F.pad(images, (left, right, top, bottom)), (0, 0)
        y = F.conv2d(images, weight, None, self.geometry.stride, padding, self.geometry.dilation, self.geometry.groups)
        return y if x.dim() == 4 else y.squeeze(0)

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        *_, height, width = shape
        top, bottom, left, right = self.geometry.padding
        padding = self._even_padding()
        if padding is None:  # the gradient of the padded images, of which the border is cut off
            height, width, padding = height + top + bottom, width + left + right, (0, 0)
        outputs = _batched(gy)
        sizes = (outputs.shape[0], shape[-3], height, width)
        # Of the images only the sizes count, and where channels lie, which is told by the weight as well.
        images = outputs.new_empty(1).expand(sizes)
        geometry = (list(self.geometry.stride), list(padding), list(self.geometry.dilation), False, [0, 0])
        gx = torch.ops.aten.convolution_backward(
            outputs, images, weight.to(gy.dtype), None, *geometry, self.geometry.groups, [True, False, False]
        )[0]
        if (height, width) != tuple(shape[-2:]):
            gx = gx[..., top : top + shape[-2], left : left + shape[-1]]
        whole: Tensor = gx.reshape(shape)
        return whole

    def row_products(self, gy: Tensor, y: Tensor) -> Tensor:
        return row_products(_batched(gy), _batched(y))

    def bias_gradient(self, gy: Tensor, shape: torch.Size) -> Tensor:
        return _batched(gy).sum((0, 2, 3))

    def _even_padding(self) -> tuple[int, int] | None:
        """Above and below, left and right; ``None`` where the two sides of one of them differ."""
        top, bottom, left, right = self.geometry.padding
        return (top, left) if (top, left) == (bottom, right) else None


@dataclass(frozen=True)
class Convolution1d(Convolution2d):
    """Signals ``[B, C_in, L]`` or ``[C_in, L]``, as images of one line."""

    KERNEL_PRODUCTS = True

    def input_rows(self, x: Tensor) -> int:
        return super().input_rows(_lines(x))

    def add_column_norms_(self, x: Tensor, norm: Tensor, ord: float) -> None:
        super().add_column_norms_(_lines(x), norm, ord)

    def channel_dim(self, x: Tensor) -> int | None:
        return x.dim() - 2 if self.geometry.groups == 1 else None

    def sampled_gradient(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        return super().sampled_gradient(_lines(gy), _lines(x), row_offsets, columns)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().multiply(_lines(x), weight.unsqueeze(2)).squeeze(-2)

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        lines = torch.Size((*shape[:-1], 1, shape[-1]))
        return super().input_gradient(_lines(gy), weight.unsqueeze(2), lines).squeeze(-2)

    def row_products(self, gy: Tensor, y: Tensor) -> Tensor:
        return super().row_products(_lines(gy), _lines(y))

    def kernel_products(self, gy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        geometry, gy = self.geometry, gy if gy.dim() == 3 else gy.unsqueeze(0)
        signals = F.pad(x if x.dim() == 3 else x.unsqueeze(0), geometry.padding[2:])
        step, spread = geometry.stride[1], geometry.dilation[1]
        found = []
        for position in range(weight.shape[2]):
            seen = signals[..., position * spread :][..., : (gy.shape[2] - 1) * step + 1 : step]
            added = F.conv1d(seen, weight[..., position : position + 1], groups=geometry.groups)
            found.append((gy.float() * added.float()).sum())
        return torch.stack(found)

    def bias_gradient(self, gy: Tensor, shape: torch.Size) -> Tensor:
        return super().bias_gradient(_lines(gy), shape)


@dataclass(frozen=True)
class Convolution3d(Convolution2d):
    """Volumes ``[B, C_in, T, H, W]``, or one ``[C_in, T, H, W]``.

    Attributes:
        geometry: of the convolution of images.
        kernel_frames: size of the kernel in time.
        frame_stride: frames from one output frame to the next.
        frame_padding: frames of zeros before and behind.
        frame_dilation: frames between neighbours in the kernel.
    """

    kernel_frames: int
    frame_stride: int
    frame_padding: tuple[int, int]
    frame_dilation: int

    def _images(self, x: Tensor) -> Tensor:
        """``[B * T_out, C_in * kt, H, W]``."""
        x = _volumes(x)
        if any(self.frame_padding):
            x = F.pad(x, (0, 0, 0, 0, *self.frame_padding))
        covered = x.unfold(2, self.frame_dilation * (self.kernel_frames - 1) + 1, self.frame_stride)
        covered = covered[..., :: self.frame_dilation]  # [B, C_in, T_out, H, W, kt]
        return covered.permute(0, 2, 1, 5, 3, 4).flatten(2, 3).flatten(0, 1)

    def _frames(self, y: Tensor) -> Tensor:
        """An output, or its gradient, as the images of its frames."""
        return _volumes(y).transpose(1, 2).flatten(0, 1)

    def input_rows(self, x: Tensor) -> int:
        x = _volumes(x)
        covered = self.frame_dilation * (self.kernel_frames - 1) + 1
        frames = (x.shape[2] + sum(self.frame_padding) - covered) // self.frame_stride + 1
        return x.shape[0] * frames * math.prod(self.geometry.output_size(x[:, :, 0]))

    def add_column_norms_(self, x: Tensor, norm: Tensor, ord: float) -> None:
        super().add_column_norms_(self._images(x), norm, ord)

    def channel_dim(self, x: Tensor) -> int | None:
        return x.dim() - 4 if self.geometry.groups == 1 else None

    def sampled_gradient(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        return super().sampled_gradient(self._frames(gy), self._images(x), row_offsets, columns)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        padding, geometry = self._even_padding(), self.geometry
        volumes, cut = _volumes(x), (0, 0)
        before, behind = self.frame_padding
        if padding is None or before != behind:
            top, bottom, left, right = geometry.padding
            volumes, before, padding = F.pad(volumes, (left, right, top, bottom, before, behind)), 0, cut
        steps = (self.frame_stride, *geometry.stride), (before, *padding), (self.frame_dilation, *geometry.dilation)
        y = F.conv3d(volumes, weight, None, *steps, geometry.groups)
        return y if x.dim() == 5 else y.squeeze(0)

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        geometry, outputs = self.geometry, _volumes(gy)
        sides = (self.frame_padding, geometry.padding[:2], geometry.padding[2:])
        padding = [first if first == last else 0 for first, last in sides]
        cut = [0 if first == last else first for first, last in sides]
        sizes = list(shape[-3:])
        grown = [n + (0 if first == last else first + last) for n, (first, last) in zip(sizes, sides, strict=True)]
        volumes = outputs.new_empty(1).expand(outputs.shape[0], shape[-4], *grown)
        steps = [self.frame_stride, *geometry.stride], padding, [self.frame_dilation, *geometry.dilation]
        gx = torch.ops.aten.convolution_backward(
            outputs, volumes, weight.to(gy.dtype), None, *steps, False, [0, 0, 0], geometry.groups, [True, False, False]
        )[0]
        for d, (begin, size) in enumerate(zip(cut, sizes, strict=True)):
            gx = gx.narrow(d + 2, begin, size)
        whole: Tensor = gx.reshape(shape)
        return whole

    def row_products(self, gy: Tensor, y: Tensor) -> Tensor:
        return row_products(_volumes(gy), _volumes(y))

    def bias_gradient(self, gy: Tensor, shape: torch.Size) -> Tensor:
        return _volumes(gy).sum((0, 2, 3, 4))


# ------------------------------------------------------------------------------------------------ readers


def read(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Call:
    dims = weight.dim() - 2
    kernel, steps, spread = tuple(int(n) for n in weight.shape[2:]), numbers(stride, dims), numbers(dilation, dims)
    if padding == "same":  # what does not divide evenly goes to the end
        total = [d * (k - 1) for k, d in zip(kernel, spread, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(n, n) for n in numbers(0 if padding == "valid" else padding, dims)]
    line = (1,) * (2 - dims)  # of a signal
    geometry = Convolution(
        _pair((*line, *kernel)[-2:]),
        _pair((*line, *steps)[-2:]),
        _four((*((0, 0) for _ in line), *sides)[-2:]),
        _pair((*line, *spread)[-2:]),
        int(groups),
    )
    kind: WeightKind = Convolution2d(geometry)
    if dims == 1:
        kind = Convolution1d(geometry)
    elif dims == 3:
        kind = Convolution3d(geometry, kernel[0], steps[0], sides[0], spread[0])
    return Call(weight, input, (bias,), kind)


def read_any(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Call | None:
    """``aten::convolution``; ``None`` for a transposed one."""
    return None if transposed else read(input, weight, bias, stride, padding, dilation, groups)


def row_products(gy: Tensor, y: Tensor) -> Tensor:
    """Of batches of one shape ``[B, O, ...]``, or with ``y`` ``[B, groups, ...]``."""
    groups = gy.float().unflatten(1, (y.shape[1], -1)) * y.float().unsqueeze(2)
    sums: Tensor = groups.flatten(3).sum((0, 3)).flatten()
    return sums


def numbers(value: Any, count: int) -> tuple[int, ...]:
    """A number for each dimension, of one for all or of one for each."""
    found = (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)
    return found * count if len(found) == 1 else found


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def _four(sides: tuple[tuple[int, int], ...]) -> tuple[int, int, int, int]:
    return *sides[0], *sides[1]


def _batched(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 3 else x


def _lines(x: Tensor) -> Tensor:
    return x.unsqueeze(-2)


def _volumes(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 4 else x


_aten = torch.ops.aten
# F.conv2d is torch.conv2d; programs of torch.export call the ops.
FUNCTIONS = {
    _aten.convolution.default: read_any,
    **dict.fromkeys(
        (
            *(F.conv1d, _aten.conv1d.default, _aten.conv1d.padding),
            *(F.conv2d, _aten.conv2d.default, _aten.conv2d.padding),
            *(F.conv3d, _aten.conv3d.default, _aten.conv3d.padding),
        ),
        read,
    ),
}
