"""Autograd nodes that compute the gradient of chosen entries, behind a layer that is computed as always."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fps_kernels import ops
from fps_kernels.tuning.saved_input import Kept, keep, take
from fps_kernels.weights.watching import Convolution


def _same_memory(y: Tensor) -> Tensor:
    """``y`` as the output of a node, without a copy.

    To hand out ``y`` itself it would have to be marked as changed in place; it often is a view (``F.linear`` reshapes a
    matrix), and the backward pass of a change to a view copies the gradient three times. A view of it, on the other hand,
    autograd lets nobody change in place. A detached tensor is neither.
    """
    return y.detach()


class _SampledGradient(torch.autograd.Function):
    """The identity on a layer's output; its backward pass adds the gradient of the chosen entries."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, values: Tensor, kept: Kept, gradient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        tensors, ctx.restore = kept
        ctx.gradient, ctx.values = gradient, values
        ctx.save_for_backward(*tensors)
        return _same_memory(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        return gy, ctx.gradient(gy, ctx.restore(*ctx.saved_tensors)), None, None


class _CompiledGradient(torch.autograd.Function):
    """:class:`_SampledGradient` for a compiler, which sees tensors and numbers and decides itself what to keep."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, *geometry: Any
    ) -> Tensor:
        ctx.save_for_backward(x, row_offsets, columns)
        ctx.geometry = geometry
        return y.clone()  # a compiled graph has no use for it, and drops it

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        x, row_offsets, columns = ctx.saved_tensors
        grad = _gradient(gy, x, row_offsets, columns, ctx.geometry)
        return gy, None, grad, None, None, *(None for _ in ctx.geometry)


def _gradient(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    grad: Tensor
    if geometry:
        grad = ops.sampled_grad_conv2d(gy, x, row_offsets, columns, *geometry)
    else:
        grad = ops.sampled_grad(gy, x, row_offsets, columns)
    return grad


def with_sampled_gradient(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    channels: Tensor | None,
    convolution: Convolution | None,
) -> Tensor:
    """``y``, the output of a layer, with a gradient for the chosen entries of the layer's weight.

    Args:
        y: ``[..., O]``, or ``[B, O, H_out, W_out]`` of a convolution; not used elsewhere yet.
        x: the layer's input ``[..., C]`` or ``[B, C_in, H, W]``.
        values: the parameter ``[nnz]`` that the gradient is for.
        row_offsets: int32 ``[O + 1]``.
        columns: int32 ``[nnz]``, counted among ``channels``.
        channels: the columns (input channels) that carry entries, int32; ``None`` for all.
        convolution: its geometry, ``None`` for a linear map.
    """
    dim = x.dim() - 1 if convolution is None else 1
    geometry: tuple[Any, ...] = ()
    if convolution is not None:
        c = convolution
        geometry = (list(c.kernel_size), list(c.stride), list(c.padding), list(c.dilation), c.groups)
    result: Tensor
    if torch.compiler.is_compiling():
        x = x.detach()
        part = x if channels is None else take(x, channels, dim)
        result = _CompiledGradient.apply(y, part.to(y.dtype), values, row_offsets, columns, *geometry)
        return result

    if getattr(y.grad_fn, "values", None) is values:
        return y  # a compiler that went through an override twice

    def gradient(gy: Tensor, part: Tensor) -> Tensor:
        return _gradient(gy, part, row_offsets, columns, geometry)

    result = _SampledGradient.apply(y, values, keep(x, channels, dim, y.dtype), gradient)
    return result


class _EmbeddingGradient(torch.autograd.Function):
    """The identity on looked-up rows; its backward pass adds the gradient of the chosen entries."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, values: Tensor, tokens: Tensor, row_offsets: Tensor, columns: Tensor, skipped: int
    ) -> Tensor:
        ctx.save_for_backward(tokens, row_offsets, columns)
        ctx.skipped = skipped
        return _same_memory(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        tokens, row_offsets, columns = ctx.saved_tensors
        # One dense row for each different token of the batch, not for each of the vocabulary.
        present, place = tokens.flatten().unique(return_inverse=True)
        rows = torch.zeros(present.numel(), gy.shape[-1], dtype=torch.float32, device=gy.device)
        rows.index_add_(0, place, gy.reshape(-1, gy.shape[-1]).float())
        rows[present == ctx.skipped] = 0
        lengths = row_offsets.diff()[present].long()
        owner = torch.repeat_interleave(lengths)
        within = torch.arange(owner.numel(), device=gy.device) - (lengths.cumsum(0) - lengths)[owner]
        entries = row_offsets[present].long()[owner] + within
        grad = torch.zeros(columns.numel(), dtype=torch.float32, device=gy.device)
        grad[entries] = rows[owner, columns[entries].long()]
        return gy, grad, None, None, None, None


def with_embedding_gradient(
    y: Tensor, tokens: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, padding_idx: int | None
) -> Tensor:
    """``y``, rows ``[..., C]`` of a weight ``[O, C]`` looked up by ``tokens``, with a gradient for its chosen entries."""
    skipped = -1 if padding_idx is None else padding_idx % (row_offsets.numel() - 1)
    result: Tensor = _EmbeddingGradient.apply(y, values, tokens, row_offsets, columns, skipped)
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
