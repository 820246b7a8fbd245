"""What a layer keeps of its input for the gradient of its chosen entries, and how it comes by it again.

Only the columns that carry entries are needed. Often they need no memory at all: the input is the output of an operation
that autograd makes keep its own input (GELU, LayerNorm) or that very output (ReLU, attention), and then the columns are
computed from that, or the output is referred to.
"""

from typing import Any

import torch
from torch import Tensor

from fps_kernels import ops
from fps_kernels.keeping.kept import Pack, Unpack
from fps_kernels.keeping.packed import looking
from fps_kernels.weights.matrix import is_simulated

NEARLY_ALL = 7 / 8  # of the columns: the whole input is kept as it is then, which costs less than to copy most of it
SMALL = 1 << 10  # numbers of an input that is kept as it is: to make it smaller would cost more than it saves

# How an operation's node calls the output that it keeps, and operations that only look at their input another way.
_KEPT_OUTPUTS = ("result", "output", "out")
_VIEWS = frozenset(
    f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Alias", "T", "Unsqueeze")
)
_RECOMPUTED = frozenset(("GeluBackward0", "NativeLayerNormBackward0"))
_kept_output_of: dict[str, str] = {}  # by the class of a node, found when one is met

_GELU, _GELU_TANH = ops.Recomputed(ops.GELU), ops.Recomputed(ops.GELU_TANH)
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


# A node of an operation from which the input is computed again, a tensor, or nothing but the input itself. The node is asked
# in the backward pass, where it is still to be run: it holds all then.
Kept = Any


def keep(x: Tensor, channels: Tensor | None, dim: int | None) -> Kept:
    """What to keep of the input of a layer.

    Args:
        x: what a weight multiplies, or the numbers of its rows that are looked up.
        channels: int32 indices along ``dim`` that are needed, ``None`` for all.
        dim: the dimension of the channels; ``None`` where all of ``x`` is needed.

    Returns:
        ``None`` for ``x`` itself, a tensor for its needed channels, and where there is nothing to keep the node that made
        ``x``. The tensor is connected with ``x``, so that a gradient of the gradient finds its way.
    """
    if x.numel() <= SMALL or not x.is_floating_point():
        return None
    # A hook (checkpointing, offloading) would have to run to get at what a node keeps. Packing is quickly undone.
    hooks = _hooks(False)
    pack: Any = None if hooks is None else hooks[0]
    reachable = pack is None or (type(pack) is Pack and pack.outer is None)
    if reachable and (node := _recomputable(x, dim)) is not None:
        return node
    if channels is None or dim is None:
        return None
    if reachable and (_is_kept_anyway(x) if pack is None else pack.has(x)):
        return None
    part = take(x, channels, dim)
    if torch.is_autocast_enabled(x.device.type):
        part = part.to(torch.get_autocast_dtype(x.device.type))
    return part


def take(x: Tensor, channels: Tensor | None, dim: int | None) -> Tensor:
    """``x.index_select(dim, channels)``; along the last dimension of rows, which torch does several times faster."""
    if channels is None or dim is None:
        return x
    if dim != x.dim() - 1 or x.dim() <= 2:
        return x.index_select(dim, channels)
    rows = x.reshape(-1, x.shape[-1]).index_select(1, channels)
    return rows.view(*x.shape[:-1], channels.numel())


def _recomputable(x: Tensor, dim: int | None) -> Any:
    """The node that made ``x``, if what it keeps tells all of ``x``."""
    node: Any = x.grad_fn
    kind = type(node).__name__  # cheaper than its name()
    if kind not in _RECOMPUTED or x._version:
        return None  # changed in place where autograd does not look: it is not what the node made any more
    if kind == "GeluBackward0":
        return node if _is_plain(node._raw_saved_self) else None
    if dim != x.dim() - 1 or not _is_plain(node._raw_saved_input):
        return None
    if x.dtype is not torch.float32 and node._saved_result1.dtype is not torch.float32:
        return None  # a mean that is rounded to 16 bits, unlike the one that the forward pass used
    return node


def _is_plain(saved: Any) -> bool:
    """Whether what a node keeps is there, or is unpacked here, and no hook that fetches it has to run."""
    hook = getattr(saved, "unpack_hook", saved)
    return hook is None or (type(hook) is Unpack and hook.outer is None)


def kept_numbers(node: Any) -> tuple[Tensor, ops.Recomputed]:
    """What a node keeps of its input, and how its output is made of that. The node itself is the next to ask for it."""
    if type(node).__name__ == "GeluBackward0":
        with looking:
            return node._saved_self, _GELU_TANH if node._saved_approximate == "tanh" else _GELU
    mean, scale = node._saved_result1, node._saved_result2
    with looking:
        x = node._saved_input
    return x, ops.Recomputed(ops.LAYER_NORM, mean, scale, node._saved_weight, node._saved_bias)


def suits_kernel(x: Tensor, how: ops.Recomputed) -> bool:
    """Whether a kernel that computes inputs again can do so: of rows that were normalised one by one, in full precision."""
    mean, weight = how.mean, how.weight
    return mean is None or (mean.numel() * x.shape[-1] == x.numel() and (weight is None or weight.dtype is torch.float32))


class _NormalisedAgain(torch.autograd.Function):
    """LayerNorm's output from its mean and scale; the node that is asked does not keep its epsilon."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, shape: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.shape = list(shape)
        return ops.recomputed(x, ops.Recomputed(ops.LAYER_NORM, mean, scale, weight, bias))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        wanted = [bool(wants) for wants in ctx.needs_input_grad[:3]]
        gradients = torch.ops.aten.native_layer_norm_backward(
            gy.to(x.dtype), x, ctx.shape, mean, scale, weight, bias, wanted
        )
        return (*(g if wants else None for g, wants in zip(gradients, wanted, strict=True)), None, None, None)


def computed_again(node: Any, channels: Tensor | None, dim: int | None, dtype: torch.dtype) -> Tensor:
    """The needed channels of the input, in operations that can be differentiated where gradients are enabled."""
    source, how = kept_numbers(node)
    if how.operation == ops.LAYER_NORM and torch.is_grad_enabled():
        shape = tuple(node._saved_normalized_shape)
        normal: Tensor = _NormalisedAgain.apply(source, how.weight, how.bias, how.mean, how.scale, shape)
        return take(normal, channels, dim).to(dtype)
    weight, bias = (None if p is None else take(p, channels, p.dim() - 1) for p in (how.weight, how.bias))
    return ops.recomputed(take(source, channels, dim), how._replace(weight=weight, bias=bias)).to(dtype)


def _is_kept_anyway(x: Tensor) -> bool:
    """Whether the memory of ``x`` is an output that the operation which made it keeps for its own backward."""
    node: Any = x.grad_fn
    while (name := type(node).__name__) in _VIEWS:
        node = node.next_functions[0][0]
    if name not in _kept_output_of:
        _kept_output_of[name] = next((kept for kept in _KEPT_OUTPUTS if hasattr(node, f"_raw_saved_{kept}")), "")
    kept = _kept_output_of[name]
    if not kept or not _is_plain(getattr(node, f"_raw_saved_{kept}")):
        return False
    value = getattr(node, f"_saved_{kept}")
    if not isinstance(value, Tensor):
        return False
    if is_simulated(x):
        return bool(value.untyped_storage()._cdata == x.untyped_storage()._cdata)
    there: bool = value.data_ptr() == x.data_ptr()  # in between are views that begin where it does
    return there
