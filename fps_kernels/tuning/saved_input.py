"""What a layer keeps of its input for the gradient of its chosen entries, and how it comes by it again.

Only the columns that carry entries are needed. Often they need no memory at all: the input is the output of an operation
that autograd makes keep its own input (GELU, LayerNorm) or that very output (ReLU, attention), and then the columns are
computed from that, or the output is referred to.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# How an operation's node calls the output that it keeps, and operations that only look at their input another way.
_KEPT_OUTPUTS = ("_raw_saved_result", "_raw_saved_output", "_raw_saved_out")
_VIEWS = frozenset(
    f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Alias", "T", "Unsqueeze")
)

Restore = Callable[..., Tensor]
Kept = tuple[tuple[Tensor, ...], Restore]


def keep(x: Tensor, channels: Tensor | None, dim: int | None, dtype: torch.dtype) -> Kept:
    """Tensors to save, and the function that makes the needed part of ``x`` of them.

    Args:
        x: what a weight multiplies, or the numbers of its rows that are looked up.
        channels: int32 indices along ``dim`` that are needed, ``None`` for all.
        dim: the dimension of the channels; ``None`` where all of ``x`` is needed.
        dtype: what the layer computes in; the part is kept in that dtype.

    Returns:
        The tensors, and ``restore(*tensors)``.
    """
    if not x.is_floating_point():
        return (x,), _itself
    if (found := _recomputed(x, channels, dim, dtype)) is not None:
        return found
    if channels is not None and x.dtype == dtype and is_kept_anyway(x):
        return (x.detach(),), lambda whole: take(whole, channels, dim)
    return (take(x.detach(), channels, dim).to(dtype),), _itself


def take(x: Tensor, channels: Tensor | None, dim: int | None) -> Tensor:
    """``x.index_select(dim, channels)``; along the last dimension of rows, which torch does several times faster."""
    if channels is None or dim is None:
        return x
    if dim != x.dim() - 1 or x.dim() <= 2:
        return x.index_select(dim, channels)
    rows = x.reshape(-1, x.shape[-1]).index_select(1, channels)
    return rows.view(*x.shape[:-1], channels.numel())


def _itself(x: Tensor) -> Tensor:
    return x


def _saved(node: Any, name: str) -> Tensor | None:
    """What an autograd node keeps, unless a hook (checkpointing, offloading) would have to run to get at it."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    if raw is None or getattr(raw, "unpack_hook", raw) is not None:
        return None
    value: Tensor | None = getattr(node, f"_saved_{name}")
    return None if value is None else value.detach()


def _hooked() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _recomputed(x: Tensor, channels: Tensor | None, dim: int | None, dtype: torch.dtype) -> Kept | None:
    node = x.grad_fn
    if node is None or _hooked() or x._version:
        return None  # changed in place where autograd does not look: it is not what the node made any more
    kind = node.name()
    if kind == "GeluBackward0":
        source, approximate = _saved(node, "self"), getattr(node, "_saved_approximate")  # noqa: B009 a node has no type
        if source is None or source.shape != x.shape:
            return None
        return (source,), lambda s: F.gelu(take(s, channels, dim), approximate=approximate).to(dtype)
    if kind == "NativeLayerNormBackward0" and dim == x.dim() - 1:
        source, mean, scale = (_saved(node, name) for name in ("input", "result1", "result2"))
        if source is None or mean is None or scale is None or mean.shape != (*x.shape[:-1], 1):
            return None
        if mean.dtype != torch.float32:
            return None  # rounded to 16 bits, unlike the mean that the forward pass used
        weight, bias = _saved(node, "weight"), _saved(node, "bias")
        affine = tuple(p for p in (weight, bias) if p is not None)

        def normalise(source: Tensor, mean: Tensor, scale: Tensor, *affine: Tensor) -> Tensor:
            # Two passes, each one operation: the memory of the columns is what this costs.
            columns = torch.addcmul(-mean * scale, take(source, channels, dim).float(), scale)
            if weight is not None and bias is not None:
                torch.addcmul(take(affine[1], channels, 0), columns, take(affine[0], channels, 0), out=columns)
            elif weight is not None:
                columns.mul_(take(affine[0], channels, 0))
            elif bias is not None:
                columns.add_(take(affine[0], channels, 0))
            return columns.to(dtype)

        return (source, mean, scale, *affine), normalise
    return None


def is_kept_anyway(x: Tensor) -> bool:
    """Whether the memory of ``x`` is an output that the operation which made it keeps for its own backward."""
    if _hooked():
        return False
    node = x.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is None:
        return False
    memory = x.untyped_storage()._cdata
    for name in _KEPT_OUTPUTS:
        raw = getattr(node, name, None)
        if raw is None or getattr(raw, "unpack_hook", raw) is not None:
            continue
        value = getattr(node, name.replace("_raw", "", 1))
        if isinstance(value, Tensor) and value.untyped_storage()._cdata == memory:
            return True
    return False
