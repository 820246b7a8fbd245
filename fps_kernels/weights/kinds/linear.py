"""Linear maps: ``y = x W^T`` with ``W`` ``[O, C]``, by ``F.linear``."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels import ops
from fps_kernels.weights.kinds.kind import Call, WeightKind, directly

NAME = "F.linear"
SCORED = True
DIMENSIONS = (2,)


@dataclass(frozen=True)
class Linear(WeightKind):
    """Every row of the weight multiplies every row of the input ``[..., C]``."""

    ADDS_INPUTS = True

    def input_rows(self, x: Tensor) -> int:
        return x.numel() // x.shape[-1] if x.shape[-1] else 0

    def add_column_norms_(self, x: Tensor, norm: Tensor, ord: float) -> None:
        directly(ops.column_norm_, x)(x, norm.view(-1), ord)

    def channel_dim(self, x: Tensor) -> int | None:
        return x.dim() - 1

    def sampled_gradient(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        grad: Tensor = ops.sampled_grad(gy, x, row_offsets, columns)
        return grad

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gy.matmul(weight.to(gy.dtype))


LINEAR = Linear()


def read(input: Any, weight: Any, bias: Any = None) -> Call | None:
    """``None`` for a weight that is no matrix."""
    return Call(weight, input, (bias,), LINEAR) if weight.dim() == 2 else None


FUNCTIONS = dict.fromkeys((F.linear, torch.ops.aten.linear.default), read)  # programs of torch.export call the op
