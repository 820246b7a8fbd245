"""Plain torch in place of each op, and the optimizer's op ready to be called: what takes turns when ops are timed."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels import ops

Csr = tuple[Tensor, Tensor]
# A cache line each to read the gradient, to read the weight and to write it; the rest is the column and both moments.
BYTES_PER_STEPPED_ENTRY = 3 * 64 + 28


def column_norm(x: Tensor) -> Tensor:
    """Of ``ops.column_norm_`` with ``ord=1``."""
    return x.abs().sum(0)


def column_norm_conv2d(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Of ``ops.column_norm_conv2d_`` with ``ord=1`` and square kernels."""
    return F.unfold(x, size, 1, padding, stride).abs().sum((0, 2))


def topk(W: Tensor, a: Tensor, k: int) -> Tensor:
    """Of ``ops.score_topk``; the columns in order of their scores."""
    return (W.abs() * a).topk(k).indices


def scores(weights: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """What the ops never store."""
    return [W.abs() * a for W, a in zip(weights, factors, strict=True)]


def kth(scores: Sequence[Tensor], k: int) -> Tensor:
    """Of ``ops.score_kth``, once there are scores."""
    return torch.cat([s.flatten() for s in scores]).topk(k).values[-1]


def at_least(scores: Sequence[Tensor], threshold: Tensor) -> list[tuple[Tensor, ...]]:
    """Of ``ops.score_select``, once there are scores: rows and columns."""
    return [(s >= threshold).nonzero(as_tuple=True) for s in scores]


def dense_gradient(gy: Tensor, x: Tensor) -> Tensor:
    """Of ``ops.sampled_grad``: every entry."""
    return gy.t() @ x


def masked_step(
    weights: Sequence[Tensor], grads: Sequence[Tensor], choices: Sequence[Csr], lr: float, weight_decay: float
) -> Callable[[], None]:
    """A call of ``ops.masked_adamw_`` on float32 weights, with the state of an optimizer that has just begun."""
    n = len(weights)
    state = [[torch.zeros(columns.numel()) for _, columns in choices] for _ in range(2)]
    steps = [torch.zeros(()) for _ in choices]
    masters = [torch.empty(0)] * n
    offsets, columns = ([choice[i] for choice in choices] for i in range(2))
    lrs, decays = torch.full((n,), lr, dtype=torch.float64), [weight_decay] * n
    fixed = (0.9, 0.999, 1e-8, False, None, None, False)
    return lambda: ops.masked_adamw_(weights, grads, offsets, columns, masters, *state, steps, lrs, decays, *fixed)
