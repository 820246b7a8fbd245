"""Linear maps whose weight is kept transposed, ``y = b + x W`` with ``W`` ``[C, O]``: Hugging Face's ``Conv1D``."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fps_kernels.weights.kinds.kind import Call
from fps_kernels.weights.kinds.linear import Linear

NAME = "torch.addmm"
SCORED = True
DIMENSIONS = (2,)


@dataclass(frozen=True)
class Transposed(Linear):
    """Every column of the weight ``[C, O]`` multiplies every row of the input.

    Attributes:
        beta: what the bias is multiplied by.
    """

    ADDS_INPUTS = False
    beta: float = 1.0

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return x.matmul(weight)

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gy.matmul(weight.to(gy.dtype).t())

    def bias_gradient(self, gy: Tensor, shape: torch.Size) -> Tensor:
        gradient = super().bias_gradient(gy, shape)
        return gradient if self.beta == 1 else gradient * self.beta


def read(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Call | None:
    """``None`` where the product is scaled, or written somewhere else than to a new tensor."""
    return Call(mat2, mat1, (input,), Transposed(beta), (1,)) if alpha == 1 and out is None else None


FUNCTIONS = dict.fromkeys((torch.addmm, Tensor.addmm, torch.ops.aten.addmm.default), read)
