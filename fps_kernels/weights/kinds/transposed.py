"""Linear maps whose weight is kept transposed, ``y = b + x W`` with ``W`` ``[C, O]``: Hugging Face's ``Conv1D``."""

from typing import Any

import torch

from fps_kernels.weights.kinds.kind import Call
from fps_kernels.weights.kinds.linear import LINEAR

NAME = "torch.addmm"
SCORED = True
DIMENSIONS = (2,)
FUNCTIONS = (torch.addmm, torch.ops.aten.addmm.default)


def read(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Call | None:
    """``None`` where the product is scaled, or written somewhere else than to a new tensor."""
    return Call(mat2, mat1, (input,), LINEAR, transposed=True) if alpha == 1 and out is None else None
