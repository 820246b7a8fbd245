"""The drop-in scorer: plain functions for code that today writes ``(W.abs() * x.abs().mean(0)).topk(k)``."""

import torch
from torch import Tensor

from fps_kernels import ops


def column_norm(x: Tensor, ord: float = 1) -> Tensor:
    """The norm of every column of ``x``, as ``torch.linalg.vector_norm(x, ord, dim=0)``, in one read of ``x``.

    Args:
        x: ``[..., C]`` float32, bfloat16 or float16; all leading dimensions are rows. Any strides.
        ord: 1, 2 or ``float("inf")``.

    Returns:
        ``[C]`` float64. Divide by the number of rows for a mean. Relative error at most 1e-5.

    Raises:
        TypeError: another dtype.
        ValueError: another ``ord``, or a scalar.

    Example:
        >>> a = fps.column_norm(x) / x[..., 0].numel()  # mean |activation| of every column
    """
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    acc = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
    ops.column_norm_(x.detach(), acc, float(ord))
    return acc.sqrt_() if ord == 2 else acc


def score_topk(W: Tensor, a: Tensor, k: int) -> Tensor:
    """Per row, the columns of the ``k`` largest ``|w_ij| * a_j``: ``(W.abs() * a).topk(k)`` without the score matrix.

    Args:
        W: ``[O, C]`` float32, bfloat16 or float16, any strides.
        a: ``[C]``, one factor per column, or ``[G, C]`` for ``G`` equal blocks of rows; any float dtype, used in float32.
        k: entries per row, from 1 to ``C``.

    Returns:
        ``[O, k]`` int32 columns, ascending within a row; equal scores go to the lower column.

    Raises:
        TypeError: another dtype.
        ValueError: shapes, devices or a ``k`` that do not fit.

    Example:
        >>> columns = fps.score_topk(layer.weight, fps.column_norm(x), k=4)
        >>> mask = torch.zeros_like(layer.weight, dtype=torch.bool).scatter_(1, columns.long(), True)
    """
    if not a.is_floating_point():
        raise TypeError(f"a must be floating-point, got {a.dtype}")
    result: Tensor = ops.score_topk(W.detach(), a.detach().float(), k)
    return result
