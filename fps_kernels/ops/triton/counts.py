"""``score_counts``: how many scores of many tensors lie above a threshold and are equal to it, in one read of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.entry_tables import entry_tables, options_of, tensor_of_program, tile_keys
from fps_kernels.ops.triton.floats import canonical_key


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
    tensor, first, W_ptr, a_ptr, O, C, stride_o, stride_c, rows_per_group, rows_per_program = tensor_of_program(
        table_ptr, map_ptr, DTYPE, ALIGNED
    )
    threshold = canonical_key(tl.load(thresholds_ptr + tensor))
    above = tl.zeros([BLOCK_R], tl.int32)
    tied = tl.zeros([BLOCK_R], tl.int32)
    last = tl.minimum(first + rows_per_program, O)
    for start in range(first, last, BLOCK_R):
        rows = (start + tl.arange(0, BLOCK_R)).to(tl.int64)  # [R]
        for start_c in range(0, C, BLOCK_C):
            key, _ = tile_keys(W_ptr, a_ptr, rows, start, start_c, O, C, stride_o, stride_c, rows_per_group, SHARED, BLOCK_C)
            above += tl.sum((key > threshold).to(tl.int32), 1)
            tied += tl.sum((key == threshold).to(tl.int32), 1)
    tl.atomic_add(counts_ptr + tensor, tl.sum(above.to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(counts_ptr + n + tensor, tl.sum(tied.to(tl.int64), 0), sem="relaxed")
