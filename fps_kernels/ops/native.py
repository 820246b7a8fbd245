"""The native CPU backend: calls the C++ library of ``csrc/``. Definitions: :mod:`.reference`.

The library itself is :mod:`.native_library`'s business; what writes to weights is in :mod:`.native_updates`.
"""

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fps_kernels.ops.native_library import (
    DTYPES,
    ISAS,
    check,
    isa,
    library,
    supported_isas,
    table,
    unavailable_reason,
    use_isa,
)
from fps_kernels.ops.native_packing import pack_groups, unpack_groups
from fps_kernels.ops.native_updates import (
    PreparedAdamW,
    PreparedAgreement,
    agree_values_,
    masked_adamw_,
    scatter_values_,
)
from fps_kernels.ops.records import Convolution, Csr, Recomputed

__all__ = [
    "ISAS",
    "PreparedAdamW",
    "PreparedAgreement",
    "agree_values_",
    "column_norm_",
    "column_norm_conv2d_",
    "isa",
    "linear_gradients",
    "masked_adamw_",
    "pack_groups",
    "sampled_grad",
    "sampled_grad_conv2d",
    "scatter_values_",
    "score_counts",
    "score_kth",
    "score_select",
    "score_topk",
    "sparse_delta_matmul_",
    "supported_isas",
    "unavailable_reason",
    "unpack_groups",
    "use_isa",
]

_CPU = torch.device("cpu")  # said wherever something is made: with another default device it would lie elsewhere
_POINTWISE = Convolution((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
_FEW = 1 << 16  # numbers of which the kernel adds up the bias's gradient: of more, torch does with all threads
_AS_IT_IS = (0, 0, 0, 0, 0)  # `Recomputed` in csrc/kernels.h
_pack_linear_gradients = struct.Struct("20q").pack  # `LinearGradients` in csrc/kernels.h
RECOMPUTES = True  # inputs of linear_gradients
_ORDS = {1.0: 1, 2.0: 2, float("inf"): 3}


def _matrix(W: Tensor, a: Tensor | None = None) -> tuple[int, ...]:
    """The fields of ``Matrix`` in ``csrc/kernels.h``."""
    factors = (0, 1) if a is None else (a.data_ptr(), a.shape[0])
    return (W.data_ptr(), *W.shape, *W.stride(), DTYPES[W.dtype], *factors)


# ------------------------------------------------------------------------------------------------ norms


def column_norm_(x: Tensor, acc: Tensor, ord: float) -> None:
    """:func:`.reference.column_norm_` in one read of ``x`` ``[M, C]``, any strides."""
    check(library().fps_column_norm(table(_matrix(x)), acc.data_ptr(), _ORDS[ord], torch.get_num_threads()))


def _images(x: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The fields of ``Images`` in ``csrc/kernels.h``."""
    return table((x.data_ptr(), *x.shape, *x.stride(), DTYPES[x.dtype]))


def _geometry(convolution: Convolution, x: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The fields of ``Convolution`` in ``csrc/kernels.h``."""
    kernel_size, stride, (top, _, left, _), dilation, groups = convolution
    return table((*kernel_size, *stride, *dilation, top, left, *convolution.output_size(x), groups))


def column_norm_conv2d_(
    x: Tensor,
    acc: Tensor,
    convolution: Convolution,
    ord: float,
) -> None:
    """:func:`.reference.column_norm_conv2d_` in one read of ``x`` ``[B, C_in, H, W]``.

    A column belongs to one channel whatever its group, and ``acc`` ``[groups, C_in/groups * kh * kw]`` lists the channels in
    order: the groups need no treatment of their own.
    """
    geometry = _geometry(convolution, x)
    check(library().fps_column_norm_conv2d(_images(x), geometry, acc.data_ptr(), _ORDS[ord], torch.get_num_threads()))


# ------------------------------------------------------------------------------------------------ scores


def score_topk(W: Tensor, a: Tensor, k: int) -> Tensor:
    """:func:`.reference.score_topk` in one read of ``W`` ``[O, C]``."""
    columns = torch.empty(W.shape[0], k, dtype=torch.int32, device=_CPU)
    check(library().fps_score_topk(table(_matrix(W, a)), k, columns.data_ptr(), torch.get_num_threads()))
    return columns


def score_kth(weights: list[Tensor], factors: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`.reference.score_kth`, exact, usually in one read of the weights."""
    n = len(weights)
    fields = table(field for W, a in zip(weights, factors, strict=True) for field in _matrix(W, a))
    threshold = torch.empty((), dtype=torch.float32, device=_CPU)
    counts = torch.empty(2, n, dtype=torch.int64, device=_CPU)
    greater, equal = counts[0], counts[1].clone()
    status = library().fps_score_kth(
        fields, n, k, threshold.data_ptr(), greater.data_ptr(), equal.data_ptr(), torch.get_num_threads()
    )
    check(status)
    return threshold, greater, equal


def score_counts(weights: list[Tensor], factors: list[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`.reference.score_counts` in one read of the weights."""
    fields = table(field for W, a in zip(weights, factors, strict=True) for field in _matrix(W, a))
    counts = torch.empty(2, len(weights), dtype=torch.int64, device=_CPU)
    greater, equal = counts[0], counts[1].clone()
    threads = torch.get_num_threads()
    status = library().fps_score_counts(
        fields, len(weights), thresholds.data_ptr(), greater.data_ptr(), equal.data_ptr(), threads
    )
    check(status)
    return greater, equal


def score_select(W: Tensor, a: Tensor, threshold: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """:func:`.reference.score_select` in two reads of ``W`` ``[O, C]``."""
    row_offsets = torch.empty(W.shape[0] + 1, dtype=torch.int32, device=_CPU)
    columns = torch.empty(nnz, dtype=torch.int32, device=_CPU)
    status = library().fps_score_select(
        table(_matrix(W, a)),
        threshold.data_ptr(),
        nnz,
        row_offsets.data_ptr(),
        columns.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, f"nnz must be what the threshold divides, got {nnz}")
    return row_offsets, columns


# ------------------------------------------------------------------------------------------------ gradients


def sampled_grad(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
    """:func:`.reference.sampled_grad`: a 1x1 convolution of one image, one row high, whose channels are the columns."""
    image_gy, image_x = (one.t()[None, :, None] for one in (gy, x))
    return sampled_grad_conv2d(image_gy, image_x, row_offsets, columns, _POINTWISE)


def sparse_delta_matmul_(
    y: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor, order: Tensor | None
) -> None:
    """:func:`.reference.sparse_delta_matmul_` in one pass over ``y``."""
    delta = (row_offsets.data_ptr(), columns.data_ptr(), values.data_ptr(), 0 if order is None else order.data_ptr())
    check(library().fps_sparse_delta_matmul(table(_matrix(y)), table(_matrix(x)), table(delta), torch.get_num_threads()))


def linear_gradients(
    gy: Tensor, x: Tensor, csr: Csr, wants_bias: bool, how: Recomputed | None
) -> tuple[Tensor, Tensor | None]:
    """:func:`.reference.linear_gradients` in one call. What is computed again never is in memory as a whole."""
    outputs, inputs = gy.shape[-1], x.shape[-1]
    gy_strides: tuple[int, ...] = (outputs, 1)
    x_strides: tuple[int, ...] = (inputs, 1)
    if not gy.is_contiguous():
        gy = gy.reshape(-1, outputs)
        gy_strides = gy.stride()
    if not x.is_contiguous():
        x = x.reshape(-1, inputs)
        x_strides = x.stride()
    numbers, nnz = gy.numel(), csr.nnz
    if not numbers or not nnz:
        return torch.zeros(nnz, device=_CPU), gy.reshape(-1, outputs).sum(0) if wants_bias else None
    grad, bias, sums, recomputed = torch.empty(nnz, device=_CPU), None, 0, _AS_IT_IS
    if wants_bias:
        if numbers <= _FEW and gy.dtype is torch.float32:
            bias = torch.empty(outputs, device=_CPU)
            sums = bias.data_ptr()
        else:
            bias = gy.reshape(-1, outputs).sum(0)
    if how is not None:
        operation, mean, scale, gamma, beta = how
        recomputed = (
            operation,
            0 if mean is None else mean.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if gamma is None else gamma.data_ptr(),
            0 if beta is None else beta.data_ptr(),
        )
    # A table of this call only: ctypes lets other threads run, which may be at the same layer.
    fields = _pack_linear_gradients(
        gy.data_ptr(),
        *gy_strides,
        DTYPES[gy.dtype],
        x.data_ptr(),
        *x_strides,
        DTYPES[x.dtype],
        numbers // outputs,
        outputs,
        inputs,
        *csr.addresses,
        grad.data_ptr(),
        sums,
        *recomputed,
    )
    if status := _linear_gradients()(fields, torch.get_num_threads()):
        check(status)
    return grad, bias


@cache
def _linear_gradients() -> Any:
    return library().fps_linear_gradients


def sampled_grad_conv2d(
    gy: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    convolution: Convolution,
) -> Tensor:
    """:func:`.reference.sampled_grad_conv2d` in one read of ``gy`` ``[B, O, H_out, W_out]``; ``x`` is not unfolded."""
    grad = torch.empty(columns.shape[0], dtype=torch.float32, device=_CPU)
    status = library().fps_sampled_grad(
        _images(gy),
        _images(x),
        _geometry(convolution, x),
        row_offsets.data_ptr(),
        columns.data_ptr(),
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    check(status)
    return grad


# ------------------------------------------------------------------------------------------------ prepared calls


_MATRIX = ctypes.c_int64 * 8


class ColumnNorms:
    """:func:`column_norm_` into one accumulator again and again, prepared so that a call costs little beside its work.

    Attributes:
        norm: float64 ``[1, C]``: what is added to.
        rows: rows that were added.
        calls: calls that added some.
    """

    __slots__ = ("_address", "_columns", "_matrix", "_order", "_run", "calls", "norm", "rows")

    def __init__(self, norm: Tensor, columns: int, address: int, order: int, run: Any) -> None:
        self.norm, self.rows, self.calls = norm, 0, 0
        self._columns, self._address, self._order, self._run = columns, address, order, run
        self._matrix: Any = None

    def add(self, x: Tensor) -> bool:
        """Add the column norms of ``[..., C]``. One thread at a time.

        Args:
            x: a plain tensor: not one of a subclass, of a function transform, or without memory.

        Returns:
            Whether it did. It does nothing where ``x`` is empty, or no contiguous float32, bfloat16 or float16 tensor on the
            CPU with so many columns.
        """
        dtype, columns = DTYPES.get(x.dtype), self._columns
        if dtype is None or not x.is_cpu or x.layout is not torch.strided or x.size(-1) != columns or not x.is_contiguous():
            return False
        rows, at = x.numel() // columns if columns else 0, x.data_ptr()
        if not rows or not at:
            return False
        matrix = self._matrix
        if matrix is None:
            self._matrix = matrix = _MATRIX(at, rows, columns, columns, 1, dtype, 0, 1)
        else:
            matrix[0], matrix[1], matrix[5] = at, rows, dtype
        if status := self._run(matrix, self._address, self._order, torch.get_num_threads()):
            check(status)
        self.rows += rows
        self.calls += 1
        return True


def column_norms(columns: Sequence[int], ord: float) -> tuple[Tensor, list[ColumnNorms]]:
    """An accumulator of zeros for inputs of each of these many columns, and the one tensor that all of them lie in."""
    memory = torch.zeros(1, sum(columns), dtype=torch.float64, device=_CPU)
    run, order, address, made = library().fps_column_norm, _ORDS[ord], memory.data_ptr(), []
    for norm, count in zip(memory.split(list(columns), dim=1), columns, strict=True):
        made.append(ColumnNorms(norm, count, address, order, run))
        address += 8 * count
    return memory, made
