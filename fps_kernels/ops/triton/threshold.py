"""``score_kth`` and ``score_select``: the exact k-th largest score of many tensors, and the entries it chooses."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.digits import BITS, SHIFTS, digit_of_rank, occurrences
from fps_kernels.ops.triton.entry_tables import entry_tables, options_of, tensor_of_program, tile_keys
from fps_kernels.ops.triton.factors import factors_by_row, share_factors, shared_factors
from fps_kernels.ops.triton.floats import NAN_KEY, canonical_key, score_key
from fps_kernels.ops.triton.target import AS_WRITTEN, register_limit


def score_kth(weights: list[Tensor], factors: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fps_kernels.ops.reference.score_kth`, without waiting for the device."""
    with torch.cuda.device_of(weights[0]):
        return launch_radix_passes(weights, factors, k)


def score_select(W: Tensor, a: Tensor, threshold: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """:func:`fps_kernels.ops.reference.score_select`, without waiting for the device."""
    with torch.cuda.device_of(W):
        row_offsets, columns = launch_select(W, a, threshold, nnz)
    if W.device.type == "cpu" and int(row_offsets[-1]) != nnz:
        raise ValueError(f"nnz must be what the threshold divides, got {nnz}")
    return row_offsets, columns


def launch_radix_passes(weights: list[Tensor], factors: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A pass for each digit, followed by its choice on the device: only counts and two numbers of state exist."""
    device, n = weights[0].device, len(weights)
    pointers, maps = entry_tables(weights, factors)
    state = torch.empty(2, dtype=torch.int64, device=device)  # the key's leading digits; the rank among keys that share them
    shared = torch.zeros(len(BITS) - 1, 1 << max(BITS), dtype=torch.int64, device=device)
    own = torch.zeros(n, 1 << BITS[-1], dtype=torch.int64, device=device)  # last digit: a histogram per tensor
    greater = torch.zeros(n, dtype=torch.int64, device=device)
    equal = torch.empty(n, dtype=torch.int64, device=device)
    threshold = torch.empty((), dtype=torch.float32, device=device)
    for number, (shift, bits) in enumerate(zip(SHIFTS, BITS, strict=True)):
        first, last = number == 0, number == len(BITS) - 1
        histogram = own if last else shared[number]
        for kind, map_ in maps.items():
            _histogram[(map_.numel(),)](
                pointers,
                map_,
                state,
                histogram,
                greater,
                SHIFT=shift,
                BITS=bits,
                FIRST=first,
                LAST=last,
                **options_of(kind, device),
            )
        _choose_digit[(1,)](
            histogram,
            state,
            k,
            n if last else 1,
            FIRST=first,
            BITS=bits,
            BLOCK_N=8 if last else 1,
            num_warps=8,
            **AS_WRITTEN,
        )
    _counts[(n,)](own, state, threshold, greater, equal, BITS=BITS[-1], num_warps=4, **AS_WRITTEN)
    return threshold, greater, equal


def launch_select(W: Tensor, a: Tensor, threshold: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """Counts per row, their prefix sums, then the columns: two reads of ``W``."""
    O, C = W.shape
    block_c = min(512, max(32, triton.next_power_of_2(C)))
    block_r = 2048 // block_c  # 16 entries per thread
    counts = torch.empty(2, O, dtype=torch.int32, device=W.device)
    row_offsets = torch.empty(O + 1, dtype=torch.int32, device=W.device)
    ties_left = torch.empty(O, dtype=torch.int64, device=W.device)
    columns = torch.empty(nnz, dtype=torch.int32, device=W.device)
    grid = (triton.cdiv(O, block_r),)
    matrix = (W, a, threshold, O, C, W.stride(0), W.stride(1), O // a.shape[0])
    shared = share_factors(W, a, block_r)
    limit = register_limit(W.device, 255)
    _count_rows[grid](*matrix, counts, SHARED=shared, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4, **limit, **AS_WRITTEN)
    _offsets[(1,)](counts, row_offsets, ties_left, O, nnz, BLOCK=1024, num_warps=4, **AS_WRITTEN)
    if nnz:
        _fill_rows[grid](
            *matrix,
            row_offsets,
            ties_left,
            columns,
            nnz,
            SHARED=shared,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=4,
            **AS_WRITTEN,
            **limit,
        )
    return row_offsets, columns


@triton.jit
def _histogram(
    table_ptr,
    map_ptr,
    state_ptr,
    histogram_ptr,
    greater_ptr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One digit of the radix selection in ``reference.score_kth``: how often each value of the digit occurs among the keys
    that share the digits chosen so far. In the last pass per tensor, with the number of keys above them.

    Must move: every weight once. A program counts in registers and adds its non-zero counters once, with integer
    atomics, whose order changes nothing; tiles without a candidate, nearly all in the last passes, skip the counting.
    """
    BINS: tl.constexpr = 1 << BITS
    tensor, first, W_ptr, a_ptr, O, C, stride_o, stride_c, rows_per_group, rows_per_program = tensor_of_program(
        table_ptr, map_ptr, DTYPE, ALIGNED
    )
    if FIRST:
        prefix = 0
    else:
        prefix = tl.load(state_ptr).to(tl.int32)
    counts = tl.zeros([BINS], tl.int32)
    above = tl.zeros([BLOCK_R], tl.int32)
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
            digit = (key >> SHIFT) & (BINS - 1)
            if FIRST:
                counts += occurrences(digit, inside, BINS)
            else:
                leading = key >> (SHIFT + BITS)
                candidate = inside & (leading == prefix)
                if tl.max(tl.max(candidate.to(tl.int32), 1), 0) > 0:
                    counts += occurrences(digit, candidate, BINS)
                if LAST:
                    above += tl.sum((inside & (leading > prefix)).to(tl.int32), 1)
    bins = tl.arange(0, BINS)
    if LAST:
        tl.atomic_add(histogram_ptr + tensor * BINS + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
        tl.atomic_add(greater_ptr + tensor, tl.sum(above.to(tl.int64), 0), sem="relaxed")
    else:
        tl.atomic_add(histogram_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["k", "n"])
def _choose_digit(histogram_ptr, state_ptr, k, n, FIRST: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The digit of the k-th largest key in ``reference.score_kth``, from the histogram: the highest bin such that at least
    as many keys lie in it and above it as the rank that remains. Must move: the histogram, ``n`` rows of it."""
    BINS: tl.constexpr = 1 << BITS
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int64)
    for start in range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)  # [N]
        part = tl.load(histogram_ptr + rows[:, None].to(tl.int64) * BINS + bins[None, :], mask=(rows < n)[:, None], other=0)
        counts += tl.sum(part, 0)
    if FIRST:
        prefix = tl.zeros([], tl.int64)
        rank = tl.zeros([], tl.int64) + k
    else:
        prefix = tl.load(state_ptr)
        rank = tl.load(state_ptr + 1)
    digit, rank = digit_of_rank(counts, rank, BINS)
    tl.store(state_ptr, prefix * BINS + digit)
    tl.store(state_ptr + 1, rank)


@triton.jit
def _counts(own_ptr, state_ptr, threshold_ptr, greater_ptr, equal_ptr, BITS: tl.constexpr):
    """The results of ``reference.score_kth`` for one tensor per program, from the histogram of its last digit."""
    BINS: tl.constexpr = 1 << BITS
    tensor = tl.program_id(0).to(tl.int64)
    key = tl.load(state_ptr).to(tl.int32)
    bins = tl.arange(0, BINS)
    counts = tl.load(own_ptr + tensor * BINS + bins)
    digit = key & (BINS - 1)
    higher = tl.sum(tl.where(bins > digit, counts, 0), 0)
    tl.store(greater_ptr + tensor, tl.load(greater_ptr + tensor) + higher)
    tl.store(equal_ptr + tensor, tl.sum(tl.where(bins == digit, counts, 0), 0))
    if tensor == 0:
        bits = tl.where(key == NAN_KEY, 0x7FC00000, key)  # a quiet NaN
        tl.store(threshold_ptr, bits.to(tl.float32, bitcast=True))


@triton.jit
def _count_rows(
    W_ptr,
    a_ptr,
    threshold_ptr,
    O,
    C,
    stride_o,
    stride_c,
    rows_per_group,
    counts_ptr,
    SHARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """First of ``reference.score_select``: ``counts[0]`` above and ``counts[1]`` equal to the threshold, for every row.

    Must move: ``W`` once, 8 bytes per row out.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    rows = first_row + tl.arange(0, BLOCK_R)  # [R]
    threshold = canonical_key(tl.load(threshold_ptr))
    above = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    tied = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for start in range(0, C, BLOCK_C):
        key, _ = tile_keys(W_ptr, a_ptr, rows, first_row, start, O, C, stride_o, stride_c, rows_per_group, SHARED, BLOCK_C)
        above += (key > threshold).to(tl.int32)
        tied += (key == threshold).to(tl.int32)
    tl.store(counts_ptr + rows, tl.sum(above, 1), mask=rows < O)
    tl.store(counts_ptr + O + rows, tl.sum(tied, 1), mask=rows < O)


@triton.jit(do_not_specialize=["nnz"])
def _offsets(counts_ptr, row_offsets_ptr, ties_left_ptr, O, nnz, BLOCK: tl.constexpr):
    """Second of ``reference.score_select``: prefix sums over the rows. What those above the threshold leave of ``nnz`` goes
    to the first rows that have some equal to it.

    Must move: 12 bytes per row in, 12 out. One program: a weight has thousands of rows, not millions.
    """
    ties = tl.zeros([], tl.int64) + nnz
    for start in range(0, O, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        ties -= tl.sum(tl.load(counts_ptr + rows, mask=rows < O, other=0).to(tl.int64), 0)
    entries = tl.zeros([], tl.int64)
    tied_entries = tl.zeros([], tl.int64)
    tl.store(row_offsets_ptr, 0)
    for start in range(0, O, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        above = tl.load(counts_ptr + rows, mask=rows < O, other=0).to(tl.int64)
        tied = tl.load(counts_ptr + O + rows, mask=rows < O, other=0).to(tl.int64)
        left = ties - (tied_entries + tl.cumsum(tied, 0) - tied)
        taken = above + tl.minimum(tied, tl.maximum(left, 0))
        tl.store(ties_left_ptr + rows, left, mask=rows < O)
        tl.store(row_offsets_ptr + 1 + rows, (entries + tl.cumsum(taken, 0)).to(tl.int32), mask=rows < O)
        entries += tl.sum(taken, 0)
        tied_entries += tl.sum(tied, 0)


@triton.jit(do_not_specialize=["nnz"])
def _fill_rows(
    W_ptr,
    a_ptr,
    threshold_ptr,
    O,
    C,
    stride_o,
    stride_c,
    rows_per_group,
    row_offsets_ptr,
    ties_left_ptr,
    columns_ptr,
    nnz,
    SHARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Third of ``reference.score_select``: the chosen columns of every row, in ascending order.

    Must move: ``W`` once, ``4 nnz`` bytes out. Writes nothing at or beyond ``nnz``, whatever the counts are.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    rows = first_row + tl.arange(0, BLOCK_R)  # [R]
    threshold = canonical_key(tl.load(threshold_ptr))
    slot = tl.load(row_offsets_ptr + rows, mask=rows < O, other=0)  # [R] where the row's next column goes
    ties_left = tl.load(ties_left_ptr + rows, mask=rows < O, other=0)  # [R] int64
    for start in range(0, C, BLOCK_C):
        key, columns = tile_keys(
            W_ptr, a_ptr, rows, first_row, start, O, C, stride_o, stride_c, rows_per_group, SHARED, BLOCK_C
        )
        tied = (key == threshold).to(tl.int32)
        chosen = (key > threshold) | ((tied > 0) & (tl.cumsum(tied, 1) <= ties_left[:, None]))
        taken = chosen.to(tl.int32)
        slots = slot[:, None] + tl.cumsum(taken, 1) - 1  # [R, C]
        tl.store(columns_ptr + slots, columns[None, :] + tl.zeros_like(slots), mask=chosen & (slots >= 0) & (slots < nnz))
        slot += tl.sum(taken, 1)
        ties_left -= tl.sum(tied, 1)
