"""2-D convolutions: a weight ``[O, C_in / groups, kh, kw]``, read as ``[O, C_in / groups * kh * kw]``."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels import ops
from fps_kernels.weights.kinds.kind import Call, WeightKind

NAME = "F.conv2d"
SCORED = True
DIMENSIONS = (4,)
# F.conv2d is torch.conv2d; programs of torch.export call the ops.
FUNCTIONS = (F.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)


@dataclass(frozen=True)
class Convolution2d(WeightKind):
    """A kernel of every output channel slides over the images ``[B, C_in, H, W]``, or over one ``[C_in, H, W]``.

    Attributes:
        kernel_size: ``(kh, kw)``.
        stride: ``(vertical, horizontal)``.
        padding: zeros around an image, ``(top, bottom, left, right)``.
        dilation: ``(vertical, horizontal)``.
        groups: number of groups.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int = 1

    def input_rows(self, x: Tensor) -> int:
        images = _batched(x)
        positions = images.shape[0]
        for size, pad, kernel, spread, stride in (
            (images.shape[2], self.padding[0] + self.padding[1], self.kernel_size[0], self.dilation[0], self.stride[0]),
            (images.shape[3], self.padding[2] + self.padding[3], self.kernel_size[1], self.dilation[1], self.stride[1]),
        ):
            positions *= (size + pad - spread * (kernel - 1) - 1) // stride + 1
        return int(positions)

    def add_column_norms_(self, x: Tensor, norm: Tensor, ord: float) -> None:
        ops.column_norm_conv2d_(
            _batched(x), norm, self.kernel_size, self.stride, self.padding, self.dilation, self.groups, ord
        )

    def channel_dim(self, x: Tensor) -> int | None:
        return x.dim() - 3 if self.groups == 1 else None

    def sampled_gradient(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        geometry = (list(self.kernel_size), list(self.stride), list(self.padding), list(self.dilation), self.groups)
        grad: Tensor = ops.sampled_grad_conv2d(_batched(gy), _batched(x), row_offsets, columns, *geometry)
        return grad


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
    return Call(weight, input, (bias,), Convolution2d(kernel, _pair(stride), sides, spread, int(groups)))


def _batched(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 3 else x


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = tuple(int(v) for v in value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])
