"""``sparse_delta_matmul_``: a sparse change beside a linear map."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.floats import bfloat16_bits, to_float32
from fps_kernels.ops.triton.target import AS_WRITTEN, register_limit

BLOCK_M, BLOCK_O = 64, 32


def sparse_delta_matmul_(
    y: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor, order: Tensor | None
) -> None:
    """:func:`fps_kernels.ops.reference.sparse_delta_matmul_`."""
    with torch.cuda.device_of(y):
        launch_sparse_delta(y, x, row_offsets, columns, values, order)


def launch_sparse_delta(
    y: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor, order: Tensor | None
) -> None:
    """One launch; a program has some rows and some outputs."""
    M, O = y.shape
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(O, BLOCK_O))
    _sparse_delta[grid](
        y,
        x,
        row_offsets,
        columns,
        values,
        columns if order is None else order,
        M,
        O,
        *y.stride(),
        *x.stride(),
        ORDERED=order is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_O=BLOCK_O,
        num_warps=4,
        **AS_WRITTEN,
        **register_limit(y.device, 255),
    )


@triton.jit
def _sparse_delta(
    y_ptr,
    x_ptr,
    row_offsets_ptr,
    columns_ptr,
    values_ptr,
    order_ptr,
    M,
    O,
    y_stride_m,
    y_stride_o,
    x_stride_m,
    x_stride_c,
    ORDERED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """``reference.sparse_delta_matmul_`` for some rows and outputs: the first entry of each output, then the second, as far
    as the longest of them goes.

    Must move: ``y`` in and out, of ``x`` the columns that carry entries. A row's columns are read from the cache again for
    each block of outputs. An output without an entry is not written.
    """
    outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)  # [O]
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    begin = tl.load(row_offsets_ptr + outputs, mask=outputs < O, other=0)
    end = tl.load(row_offsets_ptr + outputs + 1, mask=outputs < O, other=0)
    longest = tl.max(end - begin, 0)
    sums = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for step in range(longest):
        entry = begin + step
        there = entry < end
        column = tl.load(columns_ptr + entry, mask=there, other=0).to(tl.int64)
        place = entry
        if ORDERED:
            place = tl.load(order_ptr + entry, mask=there, other=0)
        value = tl.load(values_ptr + place, mask=there, other=0.0)
        inside = (rows < M)[:, None] & there[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride_m + column[None, :] * x_stride_c, mask=inside, other=0.0)
        sums += to_float32(x) * value[None, :]
    written = (rows < M)[:, None] & (end > begin)[None, :]
    at = y_ptr + rows[:, None] * y_stride_m + outputs.to(tl.int64)[None, :] * y_stride_o
    y = tl.load(at, mask=written, other=0.0)
    total = to_float32(y) + sums
    if y.dtype == tl.bfloat16:
        tl.store(at, bfloat16_bits(total).to(tl.bfloat16, bitcast=True), mask=written)
    else:
        tl.store(at, total.to(y.dtype), mask=written)
