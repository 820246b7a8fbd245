"""``score_topk``: per row the columns of the k largest scores, in ascending order, without a score matrix or a sort."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.floats import score_key

# In the machine code for sm_90, with 32 entries per thread, a round of "take the largest away" is about 210 instructions, a
# step of the bisection 120 (it takes 15 to 31, whatever k is), and ordering what it chose 1100: they meet near k = 16.
MOST_ROUNDS = 16
ROUND_SLOTS = tl.constexpr(16)
# Up to here a row's keys stay in registers; beyond it, where they would spill, the bisection computes them again, from the
# L1 and L2 caches. Without 16-byte loads every entry has an address of its own, which takes registers too.
MOST_REGISTER_COLUMNS = 8192
MOST_SCATTERED_COLUMNS = 4096


def score_topk(W: Tensor, a: Tensor, k: int) -> Tensor:
    """:func:`fps_kernels.ops.reference.score_topk`."""
    columns = torch.empty(W.shape[0], k, dtype=torch.int32, device=W.device)
    with torch.cuda.device_of(W):
        if k == 1:
            launch_argmax(W, a, columns)
        elif W.shape[1] <= (MOST_REGISTER_COLUMNS if _wide(W) else MOST_SCATTERED_COLUMNS):
            launch_select_in_registers(W, a, columns)
        else:
            launch_select_by_passes(W, a, columns)
    return columns


def _wide(W: Tensor) -> bool:
    """Whether Triton can load rows of ``W`` by 16 bytes."""
    return W.stride(1) == 1 and W.stride(0) % 16 == 0 and W.data_ptr() % 16 == 0


def launch_argmax(W: Tensor, a: Tensor, columns: Tensor) -> None:
    O, C = W.shape
    if W.stride(1) != 1 and W.stride(0) == 1:  # transposed: neighbours in memory are neighbouring rows
        block_r, block_c = 32, 64
    else:
        block_r, block_c = 4, min(512, max(32, triton.next_power_of_2(C)))
    _argmax[(triton.cdiv(O, block_r),)](
        W,
        a,
        columns,
        O,
        C,
        W.stride(0),
        W.stride(1),
        O // a.shape[0],
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=4,
    )


def launch_select_in_registers(W: Tensor, a: Tensor, columns: Tensor) -> None:
    O, C = W.shape
    k = columns.shape[1]
    block_c = triton.next_power_of_2(C)
    # Short rows: one warp each, so that no reduction needs a barrier. Long rows: 32 entries per thread, or 16 addresses.
    block_r = max(1, min(16, 4096 // block_c))
    num_warps = max(4, block_c // 1024) * (1 if _wide(W) else 2)
    _select_in_registers[(triton.cdiv(O, block_r),)](
        W,
        a,
        columns,
        O,
        C,
        W.stride(0),
        W.stride(1),
        O // a.shape[0],
        k,
        BY_ROUNDS=k <= MOST_ROUNDS,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )


def launch_select_by_passes(W: Tensor, a: Tensor, columns: Tensor) -> None:
    O, C = W.shape
    _select_by_passes[(O,)](
        W,
        a,
        columns,
        C,
        W.stride(0),
        W.stride(1),
        O // a.shape[0],
        columns.shape[1],
        BLOCK_C=4096,
        num_warps=8,
    )


@triton.jit
def _argmax(
    W_ptr,
    a_ptr,
    columns_ptr,
    O,
    C,
    stride_o,
    stride_c,
    rows_per_group,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``reference.score_topk`` for k = 1. Must move: ``W`` once, 4 bytes per row out; ``a`` comes from the caches.

    Every lane keeps the best key of its own columns, the first of equals; rows are reduced once, at the end.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    groups = rows // rows_per_group
    best = tl.full([BLOCK_R, BLOCK_C], -1, tl.int32)
    best_column = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)  # [C]
        inside = (rows < O)[:, None] & (columns < C)[None, :]
        w = tl.load(W_ptr + rows[:, None] * stride_o + columns.to(tl.int64)[None, :] * stride_c, mask=inside, other=0.0)
        a = tl.load(a_ptr + groups[:, None] * C + columns[None, :], mask=inside, other=0.0)
        key = tl.where(inside, score_key(w, a), -1)  # [R, C]
        better = key > best
        best = tl.where(better, key, best)
        best_column = tl.where(better, columns[None, :], best_column)
    row_best = tl.max(best, 1)
    first = tl.min(tl.where(best == row_best[:, None], best_column, 0x7FFFFFFF), 1)
    tl.store(columns_ptr + rows, first, mask=rows < O)


@triton.jit(do_not_specialize=["k"])
def _select_in_registers(
    W_ptr,
    a_ptr,
    columns_ptr,
    O,
    C,
    stride_o,
    stride_c,
    rows_per_group,
    k,
    BY_ROUNDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``reference.score_topk`` for whole rows in registers. Must move: ``W`` once, ``4 k`` bytes per row out.

    Few (``BY_ROUNDS``): the largest key and the first column that has it, k times. Many: bisection of the 31-bit key until
    exactly k keys reach the threshold, or the threshold is exact and the first of the keys equal to it fill up.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    columns = tl.arange(0, BLOCK_C)  # [C]
    inside = (rows < O)[:, None] & (columns < C)[None, :]
    w = tl.load(W_ptr + rows[:, None] * stride_o + columns.to(tl.int64)[None, :] * stride_c, mask=inside, other=0.0)
    a = tl.load(a_ptr + (rows // rows_per_group)[:, None] * C + columns[None, :], mask=inside, other=0.0)
    key = tl.where(inside, score_key(w, a), -1)  # [R, C]
    if BY_ROUNDS:
        slots = tl.arange(0, ROUND_SLOTS)
        found = tl.full([BLOCK_R, ROUND_SLOTS], BLOCK_C, tl.int32)  # [R, S] the columns, best first
        for number in range(k):
            row_best = tl.max(key, 1)
            first = tl.min(tl.where(key == row_best[:, None], columns[None, :], BLOCK_C), 1)
            key = tl.where(columns[None, :] == first[:, None], -2, key)
            found = tl.where(slots[None, :] == number, first[:, None], found)
        place = tl.sum((found[:, :, None] > found[:, None, :]).to(tl.int32), 2)  # [R, S] in ascending order
        tl.store(columns_ptr + rows[:, None] * k + place, found, mask=(rows < O)[:, None] & (slots < k)[None, :])
    else:
        low = tl.zeros([BLOCK_R], tl.int32)  # at least k keys are >= low
        high = tl.max(key, 1) + 1  # fewer than k keys are >= high
        while tl.max(high - low, 0) > 1:
            middle = low + (high - low) // 2
            count = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
            high = tl.where(count > k, high, tl.where(count == k, middle + 1, middle))
            low = tl.where(count >= k, middle, low)
        chosen = key >= low[:, None]
        surplus = tl.sum(chosen.to(tl.int32), 1) - k  # [R] more than k only where keys equal to the threshold are left over
        if tl.max(surplus, 0) > 0:
            tied = key == low[:, None]
            wanted = tl.sum(tied.to(tl.int32), 1) - surplus
            chosen = chosen & ((tl.cumsum(tied.to(tl.int32), 1) <= wanted[:, None]) | (key > low[:, None]))
        place = tl.cumsum(chosen.to(tl.int32), 1) - 1  # [R, C]
        tl.store(columns_ptr + rows[:, None] * k + place, columns[None, :] + tl.zeros_like(place), mask=chosen & inside)


@triton.jit
def _row_keys(W_row_ptr, a_row_ptr, start, C, stride_c, BLOCK_C: tl.constexpr):
    """The keys ``[BLOCK_C]`` of one row from column ``start`` on, -1 past its end, and their columns."""
    columns = start + tl.arange(0, BLOCK_C)
    w = tl.load(W_row_ptr + columns.to(tl.int64) * stride_c, mask=columns < C, other=0.0)
    a = tl.load(a_row_ptr + columns, mask=columns < C, other=0.0)
    return tl.where(columns < C, score_key(w, a), -1), columns


@triton.jit(do_not_specialize=["k"])
def _select_by_passes(
    W_ptr,
    a_ptr,
    columns_ptr,
    C,
    stride_o,
    stride_c,
    rows_per_group,
    k,
    BLOCK_C: tl.constexpr,
):
    """``reference.score_topk`` for rows of any length, one per program: the bisection of :func:`_select_in_registers` with
    the keys computed again in every step. Must move: ``W`` once; the other passes over a row hit the caches."""
    row = tl.program_id(0).to(tl.int64)
    W_row_ptr = W_ptr + row * stride_o
    a_row_ptr = a_ptr + (row // rows_per_group) * C
    low = 0  # at least k keys are >= low
    high = 0x7F800002  # fewer than k keys are >= high: above the key of NaN
    while high - low > 1:
        middle = low + (high - low) // 2
        counts = tl.zeros([BLOCK_C], tl.int32)
        for start in range(0, C, BLOCK_C):
            key, columns = _row_keys(W_row_ptr, a_row_ptr, start, C, stride_c, BLOCK_C)
            counts += (key >= middle).to(tl.int32)
        count = tl.sum(counts, 0)
        high = tl.where(count > k, high, tl.where(count == k, middle + 1, middle))
        low = tl.where(count >= k, middle, low)
    counts = tl.zeros([BLOCK_C], tl.int32)
    for start in range(0, C, BLOCK_C):
        key, columns = _row_keys(W_row_ptr, a_row_ptr, start, C, stride_c, BLOCK_C)
        counts += (key > low).to(tl.int32)
    wanted = k - tl.sum(counts, 0)
    filled = 0
    for start in range(0, C, BLOCK_C):
        key, columns = _row_keys(W_row_ptr, a_row_ptr, start, C, stride_c, BLOCK_C)
        tied = (key == low).to(tl.int32)
        chosen = (key > low) | ((tied > 0) & (tl.cumsum(tied, 0) <= wanted))
        taken = chosen.to(tl.int32)
        tl.store(columns_ptr + row * k + filled + tl.cumsum(taken, 0) - 1, columns, mask=chosen)
        wanted -= tl.sum(tied, 0)
        filled += tl.sum(taken, 0)
