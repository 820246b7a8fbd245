"""What autograd is about to keep, and whether fewer bits of it will do: the table, and the measurements behind it.

A hook for saved tensors is told neither which operation keeps a tensor nor whether somebody else has it; it sees the
tensor and the node that made it. `docs/measurements.md` has the errors of gradients that the lines rest on.

=========================================  ========  =============================================================
what is kept                               how       why
=========================================  ========  =============================================================
inputs of GELU, SiLU, LayerNorm, softmax,  8 bits    the gradient is off by at most one or two per cent; mean and scale
attention's values and output, outputs of            of a LayerNorm stay exact
softmax, sigmoid, tanh, columns of a
layer's input
queries and keys of a fused attention      12 bits,  it computes ``exp(q k - logsumexp)`` again, so that an error of a score
                                           or all 16 is one of the exponent
what ReLU, or LeakyReLU in place, keeps    1 bit     its backward pass asks on which side of zero a number is, and nothing
of its output                                        else: nothing is lost
masks of dropout                           1 bit     nothing is lost
outputs of log-softmax                     whole     a gradient is ``exp`` of it minus 1 at the label: at the end of
                                                     training it is smaller than the error
roots, norms, sums and means               whole     something is divided by them
small tensors                              whole     they would gain nothing
parameters, casts and views of them        whole     their memory lives on, and an error would be the same in each step
what needs no gradient: inputs, constant   whole     their memory mostly lives on; a mask of ``-inf`` has no steps
masks, statistics, tables
integers, float64, complex numbers         whole     indices have to be exact; who asks for float64 wants it
expanded tensors, other layouts, classes   whole     they are not made of their numbers one by one
=========================================  ========  =============================================================
"""

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fps_kernels.ops import FLOAT_DTYPES

SMALL = 1 << 13  # numbers below which a tensor is left alone: all of them together are less than one of the others

_EXACT = frozenset(
    f"{name}Backward0"
    for name in (
        "LogSoftmax Log Logsumexp Sqrt Rsqrt Reciprocal Sum Mean Var Std VarMean StdMean Norm LinalgVectorNorm "  # noqa: SIM905
        "Cumsum Cumprod Prod ClampMin Clamp".split()
    )
)
# Steps between a parameter and what is kept of it.
_SAME_NUMBERS = frozenset(
    f"{name}Backward0"
    for name in ("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Alias", "Unsqueeze", "Squeeze", "Slice")
) | {"ToCopyBackward0"}
_SIGNS = frozenset(("ReluBackward0", "LeakyReluBackward1"))  # the latter is the one in place
# What makes tensors of four dimensions that are images: no queries and keys of an attention.
_IMAGES = _SIGNS | {f"{name}Backward0" for name in ("Convolution", "NativeBatchNorm", "CudnnBatchNorm")}
_ATTENTION = "ScaledDotProduct"  # the names of the nodes of its kinds begin with it
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class Way(Enum):
    """How a tensor is kept."""

    WHOLE = "whole"
    GROUPS = "groups"
    HEADS = "heads"
    MASK = "mask"
    SIGNS = "signs"


def way_of(t: Tensor) -> Way:
    """How to keep a tensor that autograd is about to keep."""
    if t.numel() < SMALL or type(t) not in _PLAIN or t.layout is not torch.strided or t.is_quantized:
        return Way.WHOLE
    if t.dtype is torch.bool:
        return Way.MASK
    if t.dtype not in FLOAT_DTYPES or t.is_leaf:
        return Way.MASK if _is_scaled_mask(t) else Way.WHOLE
    name = type(t.grad_fn).__name__
    if name in _SIGNS and _is_asked_by_its_maker(t):
        return Way.SIGNS
    if name in _EXACT or _is_expanded(t):
        return Way.WHOLE
    if name in _SAME_NUMBERS and _is_of_parameter(t):
        return Way.WHOLE
    may_be_heads = t.dim() == 4 and not name.startswith(_ATTENTION) and name not in _IMAGES
    return Way.HEADS if may_be_heads else Way.GROUPS


def queries_and_keys(t: Tensor) -> list[Any]:
    """Of the output of a fused attention that it is about to keep: what its hook gave for queries and keys."""
    node: Any = t.grad_fn
    if not type(node).__name__.startswith(_ATTENTION):
        return []
    found = (getattr(node, f"_raw_saved_{name}", None) for name in ("query", "key"))
    return [saved.data for saved in found if saved is not None]


def _is_asked_by_its_maker(t: Tensor) -> bool:
    """Whether the node that made ``t`` is about to keep it, as against an operation that is given it: the node keeps nothing
    yet."""
    node: Any = t.grad_fn
    if node._raw_saved_result.data is not None:
        return False
    try:
        return node._saved_result is None
    except RuntimeError:  # it did, and let go of it after its backward pass
        return False


def _is_expanded(t: Tensor) -> bool:
    return 0 in t.stride() and any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride(), strict=True))


def _is_of_parameter(t: Tensor) -> bool:
    """Whether ``t`` is a parameter looked at in another way, or rounded to another dtype."""
    node: Any = t.grad_fn
    while type(node).__name__ in _SAME_NUMBERS:
        node = node.next_functions[0][0]
    return type(node).__name__ == "AccumulateGrad"


def _is_scaled_mask(t: Tensor) -> bool:
    """Whether all numbers of ``t`` are 0 or one other: what dropout multiplies by on a CPU. A GPU has masks of its own kind,
    and would have to be waited for."""
    if t.requires_grad or not t.is_cpu or t.dtype not in FLOAT_DTYPES or isinstance(t, FakeTensor) or not t.is_contiguous():
        return False
    numbers = t.view(-1)
    scale = numbers[:64].max()
    if not bool(scale > 0):
        return False
    parts = (numbers[:64], *numbers.split(1 << 20))
    return all(bool(((part == 0) | (part == scale)).all()) for part in parts)
