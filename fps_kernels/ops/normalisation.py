"""What LayerNorm made of its input, from what it kept of it."""

import torch
from torch import Tensor


def normalised(x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """LayerNorm's output float32 ``[..., C]``, of its input and what it kept of each row, ``[..., 1]`` each."""
    y = torch.sub(x, mean).mul_(scale)  # two passes: the memory of the columns is what this costs
    if weight is not None and bias is not None:
        return torch.addcmul(bias, y, weight, out=y)
    if weight is not None:
        return y.mul_(weight)
    return y if bias is None else y.add_(bias)
