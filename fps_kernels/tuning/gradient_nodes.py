"""Autograd nodes behind a function that is computed as always: a compiler's, and the one that refuses a gradient."""

from typing import Any

import torch
from torch import Tensor

from fps_kernels.tuning.saved_input import take
from fps_kernels.weights.kinds import WeightKind


class _CompiledGradient(torch.autograd.Function):
    """The identity on a layer's output; its backward pass adds the gradient of the chosen entries.

    A compiler sees tensors and numbers, and decides itself what to keep.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, kind: WeightKind
    ) -> Tensor:
        ctx.save_for_backward(x, row_offsets, columns)
        ctx.kind = kind
        return y.clone()  # a compiled graph has no use for it, and drops it

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        x, row_offsets, columns = ctx.saved_tensors
        return gy, None, ctx.kind.sampled_gradient(gy, x, row_offsets, columns), None, None, None


def compiled_gradient(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    channels: Tensor | None,
    kind: WeightKind,
) -> Tensor:
    """``y``, the output of a layer, with a gradient for the chosen entries of the layer's weight, for a compiler.

    Args:
        y: the output; not used elsewhere yet.
        x: the layer's input.
        values: the parameter ``[nnz]`` that the gradient is for.
        row_offsets: int32 ``[O + 1]``.
        columns: int32 ``[nnz]``, counted among ``channels``.
        channels: the channels of the input that carry entries, int32; ``None`` for all.
        kind: how the weight multiplies the input.
    """
    part = take(x.detach(), channels, kind.channel_dim(x))
    part = part.to(y.dtype) if part.is_floating_point() else part
    result: Tensor = _CompiledGradient.apply(y, part, values, row_offsets, columns, kind)
    return result


class _NoGradient(torch.autograd.Function):
    """The identity; its backward pass says that a gradient would be lost here."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, values: Tensor, message: str) -> Tensor:
        ctx.message = message
        if result._is_view():
            return result.view_as(result)
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ctx.message)


def without_gradient(result: Any, values: Tensor, message: str) -> Any:
    """``result`` of a function that has no gradient for ``values``: a backward pass through it raises ``message``."""
    if isinstance(result, Tensor) and result.is_floating_point():
        return _NoGradient.apply(result, values, message)
    if isinstance(result, list | tuple):
        items = [without_gradient(item, values, message) for item in result]
        return items if isinstance(result, list) else _as(type(result), items)
    return result


def _as(kind: type, items: list[Any]) -> Any:
    """A tuple, or one with names such as those of ``max`` and ``svd``: theirs take one sequence."""
    return tuple(items) if kind is tuple else kind(items)
