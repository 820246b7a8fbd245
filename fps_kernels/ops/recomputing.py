"""What an operation made of its input, from what it kept of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels.ops.records import GELU_TANH, LAYER_NORM, Recomputed


def recomputed(x: Tensor, how: Recomputed) -> Tensor:
    """The output of the operation of which ``x`` ``[..., C]`` is the input; of a LayerNorm in float32."""
    if how.operation != LAYER_NORM:
        return F.gelu(x, approximate="tanh" if how.operation == GELU_TANH else "none")
    assert how.mean is not None
    assert how.scale is not None
    y = torch.sub(x, how.mean).mul_(how.scale)  # two passes: the memory of the columns is what this costs
    if how.weight is not None and how.bias is not None:
        return torch.addcmul(how.bias, y, how.weight, out=y)
    if how.weight is not None:
        return y.mul_(how.weight)
    return y if how.bias is None else y.add_(how.bias)
