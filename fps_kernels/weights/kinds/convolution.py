"""2-D convolutions: a weight ``[O, C_in / groups, kh, kw]``, read as ``[O, C_in / groups * kh * kw]``."""

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
DIMENSIONS = (4,)
# F.conv2d is torch.conv2d; programs of torch.export call the ops.
FUNCTIONS = (F.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)


@dataclass(frozen=True)
class Convolution2d(WeightKind):
    """A kernel of every output channel slides over the images ``[B, C_in, H, W]``, or over one ``[C_in, H, W]``.

    Attributes:
        geometry: kernel, stride, padding, dilation and groups.
    """

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

    def bias_gradient(self, gy: Tensor, shape: torch.Size) -> Tensor:
        return _batched(gy).sum((0, 2, 3))

    def _even_padding(self) -> tuple[int, int] | None:
        """Above and below, left and right; ``None`` where the two sides of one of them differ."""
        top, bottom, left, right = self.geometry.padding
        return (top, left) if (top, left) == (bottom, right) else None


def read(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Call:
    kernel, spread = (int(weight.shape[2]), int(weight.shape[3])), _pair(dilation)
    if padding == "same":  # what does not divide evenly goes to the end
        total = [d * (k - 1) for k, d in zip(kernel, spread, strict=True)]
        sides = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        vertical, horizontal = _pair(0 if padding == "valid" else padding)
        sides = (vertical, vertical, horizontal, horizontal)
    geometry = Convolution(kernel, _pair(stride), sides, spread, int(groups))
    return Call(weight, input, (bias,), Convolution2d(geometry))


def _batched(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 3 else x


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = tuple(int(v) for v in value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])
