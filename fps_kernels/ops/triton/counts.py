"""``score_counts``: how many scores of many tensors lie above a threshold and are equal to it, in one read of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.entry_tables import FIELDS, entry_tables, options_of
from fps_kernels.ops.triton.factors import factors_by_row, shared_factors
from fps_kernels.ops.triton.floats import canonical_key, score_key


def score_counts(weights: list[Tensor], factors: list[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`fps_kernels.ops.reference.score_counts`, without waiting for the device."""
    with torch.cuda.device_of(weights[0]):
        return launch_counts(weights, factors, thresholds)


def launch_counts(weights: list[Tensor], factors: list[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """A launch for each kind of tensor."""
    device, n = weights[0].device, len(weights)
    pointers, maps = entry_tables(weights, factors)
    counts = torch.zeros(2, n, dtype=torch.int64, device=device)
    for kind, map_ in maps.items():
        _count_entries[(map_.numel(),)](pointers, map_, thresholds, counts, n, **options_of(kind, device))
    return counts[0], counts[1].clone()


@triton.jit(do_not_specialize=["n"])
def _count_entries(
    table_ptr,
    map_ptr,
    thresholds_ptr,
    counts_ptr,
    n,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``reference.score_counts`` of some rows of a tensor.

    Must move: every weight once. A program counts in registers and adds twice, with integer atomics, whose order changes
    nothing.
    """
    entry = tl.load(map_ptr + tl.program_id(0))  # tensor << 32 | number of the program within it
    tensor = entry >> 32
    fields = table_ptr + tensor * FIELDS
    W_ptr = tl.load(fields).to(tl.pointer_type(DTYPE))
    a_ptr = tl.load(fields + 1).to(tl.pointer_type(tl.float32))
    O = tl.load(fields + 2).to(tl.int32)
    C = tl.load(fields + 3).to(tl.int32)
    stride_o = tl.load(fields + 4)
    stride_c = tl.load(fields + 5)
    rows_per_group = tl.load(fields + 6).to(tl.int32)
    rows_per_program = tl.load(fields + 7).to(tl.int32)
    if ALIGNED:  # promises that hold for this kind of tensor; nothing is known of numbers read from a table
        W_ptr = tl.multiple_of(W_ptr, 16)
        a_ptr = tl.multiple_of(a_ptr, 16)
        stride_o = tl.multiple_of(stride_o, 16)
        C = tl.multiple_of(C, 16)
        stride_c = 1
    threshold = canonical_key(tl.load(thresholds_ptr + tensor))
    above = tl.zeros([BLOCK_R], tl.int32)
    tied = tl.zeros([BLOCK_R], tl.int32)
    first = entry.to(tl.int32) * rows_per_program
    last = tl.minimum(first + rows_per_program, O)
    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)  # [R]
        for start_c in range(0, C, BLOCK_C):
            columns = start_c + tl.arange(0, BLOCK_C)  # [C]
            inside = (rows < O)[:, None] & (columns < C)[None, :]
            offsets = rows.to(tl.int64)[:, None] * stride_o + columns.to(tl.int64)[None, :] * stride_c
            w = tl.load(W_ptr + offsets, mask=inside, other=0.0)
            if SHARED:
                key = score_key(w, shared_factors(a_ptr, start, columns, C, rows_per_group))  # [R, C]
            else:
                key = score_key(w, factors_by_row(a_ptr, rows, columns, O, C, rows_per_group))
            above += tl.sum((inside & (key > threshold)).to(tl.int32), 1)
            tied += tl.sum((inside & (key == threshold)).to(tl.int32), 1)
    tl.atomic_add(counts_ptr + tensor, tl.sum(above.to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(counts_ptr + n + tensor, tl.sum(tied.to(tl.int64), 0), sem="relaxed")
