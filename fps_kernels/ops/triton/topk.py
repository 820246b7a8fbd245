"""``score_topk``: per row the columns of the k largest scores, in ascending order, without a score matrix or a sort."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.digits import FIRST_BITS, NEXT_BITS, NEXT_DIGITS, digit_of_rank, occurrences
from fps_kernels.ops.triton.entry_tables import tile_keys
from fps_kernels.ops.triton.factors import factors_by_row, share_factors, shared_factors
from fps_kernels.ops.triton.floats import score_key
from fps_kernels.ops.triton.target import AS_WRITTEN, register_limit, target_of

# In the machine code for sm_90, with 32 entries per thread, a round of "take the largest away" is about 210 instructions, a
# step of the bisection 120 (it takes 15 to 31, whatever k is), and ordering what it chose 1100: they meet near k = 16.
MOST_ROUNDS = 16
ROUND_SLOTS = tl.constexpr(16)
# Up to here a row's keys stay in registers. Beyond it, where they would spill, each pass computes them again, from the L1
# and L2 caches. Compiled for sm_80 and sm_90, 512 threads have the registers for twice as many as on other targets.
MOST_REGISTER_COLUMNS = 8192
MOST_REGISTER_COLUMNS_SM_8_9 = 16384
# Without 16-byte loads every entry has an address of its own, which takes registers too.
MOST_SCATTERED_COLUMNS = 4096
SECTOR = 32
# Rows that a program reads with the factors of the first: four bytes a column then are half of two bytes in each of four.
ROWS_PER_FACTOR = 4


def score_topk(W: Tensor, a: Tensor, k: int) -> Tensor:
    """:func:`fps_kernels.ops.reference.score_topk`."""
    columns = torch.empty(W.shape[0], k, dtype=torch.int32, device=W.device)
    with torch.cuda.device_of(W):
        if k == 1:
            launch_argmax(W, a, columns)
        elif W.shape[1] <= _most_register_columns(W):
            launch_select_in_registers(W, a, columns)
        else:
            launch_select_by_passes(W, a, columns)
    return columns


def _most_register_columns(W: Tensor) -> int:
    if not _wide(W):
        return MOST_SCATTERED_COLUMNS
    twice = target_of(W.device).startswith(("sm_8", "sm_9"))
    return MOST_REGISTER_COLUMNS_SM_8_9 if twice else MOST_REGISTER_COLUMNS


def _wide(W: Tensor) -> bool:
    """Whether Triton can load rows of ``W`` by 16 bytes."""
    return W.stride(1) == 1 and all(n % 16 == 0 for n in (W.shape[1], W.stride(0), W.data_ptr()))


def _transposed(W: Tensor) -> bool:
    """Whether neighbours in memory are neighbouring rows."""
    return W.stride(1) != 1 and W.stride(0) == 1


def launch_argmax(W: Tensor, a: Tensor, columns: Tensor) -> None:
    O, C = W.shape
    if _transposed(W):
        block_r, block_c = 32, 64
    else:
        block_r, block_c = 8, min(256, max(32, triton.next_power_of_2(C)))
    _argmax[(triton.cdiv(O, block_r),)](
        W,
        a,
        columns,
        O,
        C,
        W.stride(0),
        W.stride(1),
        O // a.shape[0],
        SHARED=share_factors(W, a, block_r),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=4,
        **AS_WRITTEN,
    )


def launch_select_in_registers(W: Tensor, a: Tensor, columns: Tensor) -> None:
    O, C = W.shape
    k = columns.shape[1]
    block_c = triton.next_power_of_2(C)
    if _transposed(W):  # a sector of rows, or half of one where a whole one would spill
        fewest = 1 if target_of(W.device).startswith("gfx") else 4
        block_r = max(fewest, min(SECTOR // W.element_size(), 8192 // block_c))
    else:  # short rows: one warp each, so that no reduction needs a barrier
        block_r = max(1, min(16, 4096 // block_c))
    turns = max(1, ROWS_PER_FACTOR // block_r)
    # 32 entries a thread, 16 where each has an address or where several warps serve a row and need no more than 512 threads.
    per_warp = 1024 if _transposed(W) or (_wide(W) and block_c not in (2048, 4096)) else 512
    num_warps = max(4, block_r * block_c // per_warp)
    _select_in_registers[(triton.cdiv(O, block_r * turns),)](
        W,
        a,
        columns,
        O,
        C,
        W.stride(0),
        W.stride(1),
        O // a.shape[0],
        k,
        SHARED=share_factors(W, a, block_r * turns),
        BY_ROUNDS=k <= MOST_ROUNDS,
        TURNS=turns,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=num_warps,
        **AS_WRITTEN,
        **({} if _wide(W) else register_limit(W.device, 128)),
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
        FIRST_BITS=FIRST_BITS,
        NEXT_BITS=NEXT_BITS,
        NEXT_DIGITS=NEXT_DIGITS,
        BLOCK_C=4096,
        num_warps=8,
        **AS_WRITTEN,
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
    SHARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``reference.score_topk`` for k = 1. Must move: ``W`` once, 4 bytes per row out; ``a`` comes from the caches.

    Every lane keeps the best key of its own columns, the first of equals; rows are reduced once, at the end.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    rows = first_row + tl.arange(0, BLOCK_R)  # [R]
    best = tl.full([BLOCK_R, BLOCK_C], -1, tl.int32)
    best_column = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for start in range(0, C, BLOCK_C):
        key, columns = tile_keys(
            W_ptr, a_ptr, rows, first_row, start, O, C, stride_o, stride_c, rows_per_group, SHARED, BLOCK_C
        )
        better = key > best  # [R, C]
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
    SHARED: tl.constexpr,
    BY_ROUNDS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``reference.score_topk`` for whole rows in registers. Must move: ``W`` once, ``4 k`` bytes per row out.

    Few (``BY_ROUNDS``): the largest key and the first column that has it, k times. Many: bisection of the 31-bit key until
    exactly k keys reach the threshold, or the threshold is exact and the first of the keys equal to it fill up.
    """
    first_row = tl.program_id(0).to(tl.int64) * (BLOCK_R * TURNS)
    columns = tl.arange(0, BLOCK_C)  # [C]
    if SHARED:
        a = shared_factors(a_ptr, first_row, columns, C, rows_per_group)
    for turn in range(TURNS):
        rows = first_row + turn * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
        inside = (rows < O)[:, None] & (columns < C)[None, :]
        w = tl.load(W_ptr + rows[:, None] * stride_o + columns.to(tl.int64)[None, :] * stride_c, mask=inside, other=0.0)
        if SHARED:
            score = score_key(w, a)
        else:
            score = score_key(w, factors_by_row(a_ptr, rows, columns, O, C, rows_per_group))
        key = tl.where(inside, score, -1)  # [R, C]
        if BY_ROUNDS:
            _store_by_rounds(columns_ptr, key, rows, columns, O, k, BLOCK_R, BLOCK_C)
        else:
            _store_by_bisection(columns_ptr, key, rows, columns, inside, k, BLOCK_R, BLOCK_C)


@triton.jit
def _store_by_rounds(columns_ptr, key, rows, columns, O, k, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The columns of the ``k`` largest keys of each row ``[R, C]``, at most :data:`ROUND_SLOTS`, one after the other."""
    slots = tl.arange(0, ROUND_SLOTS)
    found = tl.full([BLOCK_R, ROUND_SLOTS], BLOCK_C, tl.int32)  # [R, S] the columns, best first
    for number in range(k):
        row_best = tl.max(key, 1)
        first = tl.min(tl.where(key == row_best[:, None], columns[None, :], BLOCK_C), 1)
        key = tl.where(columns[None, :] == first[:, None], -2, key)
        found = tl.where(slots[None, :] == number, first[:, None], found)
    place = tl.sum((found[:, :, None] > found[:, None, :]).to(tl.int32), 2)  # [R, S] in ascending order
    tl.store(columns_ptr + rows[:, None] * k + place, found, mask=(rows < O)[:, None] & (slots < k)[None, :])


@triton.jit
def _store_by_bisection(columns_ptr, key, rows, columns, inside, k, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The columns of the ``k`` largest keys of each row ``[R, C]``."""
    low = tl.zeros([BLOCK_R], tl.int32)  # at least k keys are >= low
    high = tl.max(key, 1) + 1  # fewer than k keys are >= high
    while tl.max(high - low, 0) > 1:
        middle = low + (high - low) // 2
        count = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        high = tl.where(count > k, high, tl.where(count == k, middle + 1, middle))
        low = tl.where(count >= k, middle, low)
    wanted = k - tl.sum((key > low[:, None]).to(tl.int32), 1)  # [R] of the keys equal to the threshold, the first ones
    bound = tl.full([BLOCK_R], BLOCK_C, tl.int32)  # those left of it
    if tl.max(tl.sum((key == low[:, None]).to(tl.int32), 1) - wanted, 0) > 0:
        before = tl.zeros([BLOCK_R], tl.int32)  # fewer than wanted lie left of it
        while tl.max(bound - before, 0) > 1:
            middle = (before + bound) // 2
            count = tl.sum(((key == low[:, None]) & (columns[None, :] < middle[:, None])).to(tl.int32), 1)
            bound = tl.where(count >= wanted, middle, bound)
            before = tl.where(count >= wanted, before, middle)
    chosen = (key > low[:, None]) | ((key == low[:, None]) & (columns[None, :] < bound[:, None]))
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1  # [R, C]
    tl.store(columns_ptr + rows[:, None] * k + place, columns[None, :] + tl.zeros_like(place), mask=chosen & inside)


@triton.jit
def _row_keys(W_row_ptr, a_row_ptr, start, C, stride_c, BLOCK_C: tl.constexpr):
    """The keys ``[BLOCK_C]`` of one row from column ``start`` on, -1 past its end, and their columns."""
    columns = start + tl.arange(0, BLOCK_C)
    w = tl.load(W_row_ptr + columns.to(tl.int64) * stride_c, mask=columns < C, other=0.0)
    a = tl.load(a_row_ptr + columns, mask=columns < C, other=0.0)
    return tl.where(columns < C, score_key(w, a), -1), columns


@triton.jit
def _next_digit(
    W_row_ptr, a_row_ptr, C, stride_c, prefix, rank, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One more digit of a row's ``rank``-th largest key of those that begin with ``prefix``, and the rank that is left."""
    counts = tl.zeros([1 << BITS], tl.int32)
    for start in range(0, C, BLOCK_C):
        key, columns = _row_keys(W_row_ptr, a_row_ptr, start, C, stride_c, BLOCK_C)
        candidate = (columns < C) & (key >> (SHIFT + BITS) == prefix)
        counts += occurrences((key >> SHIFT) & ((1 << BITS) - 1), candidate, 1 << BITS)
    digit, rank = digit_of_rank(counts, rank, 1 << BITS)
    return (prefix << BITS) + digit, rank


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
    FIRST_BITS: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    NEXT_DIGITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``reference.score_topk`` for rows of any length, one per program: the key of the k-th largest digit by digit, then all
    that reach it. Must move: ``W`` once; the other passes over a row hit the caches."""
    row = tl.program_id(0).to(tl.int64)
    W_row_ptr = W_ptr + row * stride_o
    a_row_ptr = a_ptr + (row // rows_per_group) * C
    SHIFT: tl.constexpr = NEXT_DIGITS * NEXT_BITS
    low, wanted = _next_digit(W_row_ptr, a_row_ptr, C, stride_c, 0, k, SHIFT, FIRST_BITS, BLOCK_C)
    for number in tl.static_range(1, NEXT_DIGITS + 1):
        low, wanted = _next_digit(
            W_row_ptr, a_row_ptr, C, stride_c, low, wanted, SHIFT - number * NEXT_BITS, NEXT_BITS, BLOCK_C
        )
    filled = 0
    for start in range(0, C, BLOCK_C):
        key, columns = _row_keys(W_row_ptr, a_row_ptr, start, C, stride_c, BLOCK_C)
        tied = (key == low).to(tl.int32)
        chosen = (key > low) | ((tied > 0) & (tl.cumsum(tied, 0) <= wanted))
        taken = chosen.to(tl.int32)
        tl.store(columns_ptr + row * k + filled + tl.cumsum(taken, 0) - 1, columns, mask=chosen)
        wanted -= tl.sum(tied, 0)
        filled += tl.sum(taken, 0)
