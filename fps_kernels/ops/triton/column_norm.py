"""``column_norm_`` in two stages without float atomics: tiles of rows to partial sums, partial sums to the accumulator.

The grid depends on the shape alone, never on the device, and both stages add in a fixed order: one input gives the same
bits on every run and on every GPU of a family.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.floats import magnitude_bits, to_float32
from fps_kernels.ops.triton.target import AS_WRITTEN

# About four programs for each of an H100's 132 SMs: enough loads in flight to saturate the memory, and few enough
# partial sums that writing them and reading them back stays below a few per cent of reading x.
TARGET_PROGRAMS = 528
BLOCK_C = 256  # columns per program: divides 768, 1024, 1280, ..., and a warp reads 512 contiguous bytes of bfloat16
PARTIALS_BLOCK_C = 32


def column_norm_(x: Tensor, acc: Tensor, ord: float) -> None:
    """:func:`fps_kernels.ops.reference.column_norm_` for ``x`` ``[M, C]`` of any strides."""
    with torch.cuda.device_of(x):
        launch_add_partials(launch_partial_norms(x, ord), acc, ord)


def launch_partial_norms(x: Tensor, ord: float) -> Tensor:
    """Stage 1. Its result, float64 ``[splits, C]``, takes at most ``8 * (528 * 256 + C)`` bytes, whatever ``M`` is."""
    M, C = x.shape
    column_blocks = triton.cdiv(C, BLOCK_C)
    # 128 rows are the most that float32 may add; fewer where that would leave SMs without work.
    tile_rows = 128 if triton.cdiv(M, 128) * column_blocks >= TARGET_PROGRAMS else 32
    # With eight warps a thread has two to eight 16-byte loads on their way at a time, so that three programs on an SM have
    # more than 20 KiB in flight, which covers the latency of an H100's memory.
    block_m = 16 if tile_rows == 128 else 32
    tiles = triton.cdiv(M, tile_rows)
    tiles_per_split = triton.cdiv(tiles, triton.cdiv(TARGET_PROGRAMS, column_blocks))
    splits = triton.cdiv(tiles, tiles_per_split)
    partials = torch.empty(splits, C, dtype=torch.float64, device=x.device)
    _partial_norms[(column_blocks, splits)](
        x,
        partials,
        M,
        C,
        x.stride(0),
        x.stride(1),
        tiles_per_split * tile_rows,
        ORD=ord_code(ord),
        TILE_ROWS=tile_rows,
        BLOCK_M=block_m,
        BLOCK_C=BLOCK_C,
        num_warps=8,
        **AS_WRITTEN,
    )
    return partials


def launch_add_partials(partials: Tensor, acc: Tensor, ord: float) -> None:
    """Stage 2: the partial sums ``[splits, C]`` into ``acc``, whose ``C`` elements are contiguous."""
    splits, C = partials.shape
    _add_partials[(triton.cdiv(C, PARTIALS_BLOCK_C),)](
        partials,
        acc,
        C,
        splits,
        ORD=ord_code(ord),
        BLOCK_S=min(128, triton.next_power_of_2(splits)),
        BLOCK_C=PARTIALS_BLOCK_C,
        num_warps=4,
        **AS_WRITTEN,
    )


def ord_code(ord: float) -> int:
    """``ord`` as a compile-time integer: 1, 2, or 0 for infinity."""
    return 0 if ord == float("inf") else int(ord)


@triton.jit
def accumulate(part, x, ORD: tl.constexpr):
    """One more tile of ``x`` into a float32 tile of sums, or (``ORD`` 0) into an int32 tile of the largest magnitudes.

    Maxima are taken over the bits: as integers they are exact, and NaN, being above infinity, wins without a comparison.
    """
    if ORD == 0:
        return tl.maximum(part, magnitude_bits(x))
    elif ORD == 1:
        return part + tl.abs(to_float32(x))
    else:
        return tl.fma(to_float32(x), to_float32(x), part)


@triton.jit
def larger(acc, found):
    """The larger of two float64 numbers, NaN if either is.

    Written out because `max` of float64 drops NaN on some targets; a NaN in ``acc`` loses no comparison and stays.
    """
    return tl.where((found > acc) | (found != found), found, acc)


@triton.jit
def _partial_norms(
    x_ptr,
    partials_ptr,
    M,
    C,
    stride_m,
    stride_c,
    rows_per_split,
    ORD: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stage 1 of ``reference.column_norm_``: ``partials[split, j] = sum_m |x_mj|^ord`` over the rows of one split.

    Must move: ``x`` once. Each column has one float64 addition per ``TILE_ROWS`` rows, so that GPUs with little float64
    throughput stay bound by memory. In float32 a tile adds ``TILE_ROWS / BLOCK_M`` numbers in turn, then ``BLOCK_M``: at
    most 34 roundings with the square, relative error below 2.1e-6. A square above 3.4e38 is infinite, one below 1e-45
    zero, as in any float32 sum.
    """
    columns = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    split = tl.program_id(1).to(tl.int64)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    if ORD == 0:
        total = tl.zeros([BLOCK_C], tl.int32)
    else:
        total = tl.zeros([BLOCK_C], tl.float64)
    for tile in range(first, last, TILE_ROWS):
        if ORD == 0:
            part = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
        else:
            part = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start in range(0, TILE_ROWS, BLOCK_M):
            rows = tile + start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            x = tl.load(
                x_ptr + rows[:, None] * stride_m + columns[None, :] * stride_c,
                mask=(rows < last)[:, None] & (columns < C)[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_C]
            part = accumulate(part, x, ORD)
        if ORD == 0:
            total = tl.maximum(total, tl.max(part, 0))
        else:
            total += tl.sum(part, 0).to(tl.float64)
    if ORD == 0:
        total = total.to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(partials_ptr + split * C + columns, total, mask=columns < C)


@triton.jit
def _add_partials(
    partials_ptr,
    acc_ptr,
    C,
    splits,
    ORD: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stage 2 of ``reference.column_norm_``: ``acc[j] += sum_s partials[s, j]``, or the maximum of both.

    Must move: the partials once. The order of the additions is fixed by the shape.
    """
    columns = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = columns < C
    if ORD == 0:
        largest = tl.zeros([BLOCK_C], tl.int64)
    else:
        total = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, splits, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S).to(tl.int64)  # [BLOCK_S]
        part = tl.load(
            partials_ptr + rows[:, None] * C + columns[None, :],
            mask=(rows < splits)[:, None] & inside[None, :],
            other=0.0,
        )  # [BLOCK_S, BLOCK_C]
        if ORD == 0:
            largest = tl.maximum(largest, tl.max(part.to(tl.int64, bitcast=True), 0))
        else:
            total += tl.sum(part, 0)
    acc = tl.load(acc_ptr + columns, mask=inside, other=0.0)
    if ORD == 0:
        result = larger(acc, largest.to(tl.float64, bitcast=True))
    else:
        result = acc + total
    tl.store(acc_ptr + columns, result, mask=inside)
