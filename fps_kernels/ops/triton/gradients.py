"""``sampled_grad``: the gradient of a linear map's weight at its selected entries, in two stages without float atomics.

Stage 1 sums parts of the rows, stage 2 (:mod:`.splits`) adds those sums in a fixed order, unless one part is all. Stage 1
has two ways, chosen by density: the tile product multiplies whole tiles on tensor cores and keeps what is selected;
gathering fetches two numbers for each product.
"""

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops._dispatch import interpreted
from fps_kernels.ops.records import Csr, Recomputed
from fps_kernels.ops.triton.floats import to_float32
from fps_kernels.ops.triton.launching import Plans, alignment, launch
from fps_kernels.ops.triton.splits import Plan, finish
from fps_kernels.ops.triton.target import AS_WRITTEN, register_limit, target_of
from fps_kernels.ops.triton.updates import rows_of

MOST_SPLITS = 64  # float32 partial sums per entry
# Two programs for each of an H100's 132 SMs where a program has eight warps, eight where it has four and waits for memory.
PRODUCT_PROGRAMS = 264
GATHER_PROGRAMS = 1056
# How many rows a program may add. A tensor core cuts off where it adds: 2^-22 of the largest sum for 16 rows is a cautious
# figure, so 512 rows lose at most 32 * 2^-22 = 7.6e-6. The three tf32 products of a float32 product agree to 5.4e-7, four
# steps of a tensor core add 32 rows of them, and their sums are added outside it: 5.4e-7 + 4 * 2^-22 + 16 * 2^-24 = 2.5e-6.
# What is multiplied as it is ("ieee") is rounded once a row: 128 rows lose at most 7.6e-6.
MOST_ROWS = {"short": 512, "tf32x3": 512, "ieee": 128}
GATHER_ENTRIES = 128
GATHER_ROWS = 8
# Calculated from the data sheets of an A100 and an H100 (80 GB SXM), geometric means of both; nothing was measured.
# A multiplication in a tile: 2 FLOP at half the dense rate (312 and 989 TFLOP/s of bfloat16, a sixth of it in three tf32s).
# A gathered one: a lane of a load that takes four cycles for 32 lanes on each SM (108 at 1.41 GHz, 132 at 1.755 GHz). That
# is as long as 65 and 134 multiplications of 16-bit tiles, or 11 and 22 of float32 tiles.
TILED_PER_GATHERED = {2: 93.0, 4: 15.5}
# A sector (32 bytes) that comes from the L2 cache, at half its 5120 bytes per cycle: 10.7 and 13.1 gathered multiplications.
GATHERED_PER_SECTOR = 12.0


_plans = Plans()


def sampled_grad(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
    """:func:`fps_kernels.ops.reference.sampled_grad`. Workspace: :data:`MOST_SPLITS` float32 numbers per entry."""
    return _sums(gy, x, row_offsets, columns, bias=False)


def sampled_grad_with_bias(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`sampled_grad` of ``gy`` ``[M, O]``, and its sum over the rows, float32 ``[O]``, by the same launches.

    There may be no entries and no rows. Both results share one allocation.
    """
    nnz, O = columns.shape[0], gy.shape[1]
    if gy.numel():
        sums = _sums(gy, x, row_offsets, columns, bias=True)
    else:
        sums = torch.zeros(nnz + O, dtype=torch.float32, device=gy.device)
    grad, bias_grad = sums.split_with_sizes((nnz, O))
    return grad, bias_grad


def _key(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, bias: bool) -> Hashable:
    """What a launch depends on."""
    where = gy.data_ptr(), x.data_ptr(), row_offsets.data_ptr(), columns.data_ptr()
    kinds = gy.shape, gy.stride(), gy.dtype, x.shape, x.stride(), x.dtype, columns.shape
    return kinds, alignment(where), gy.get_device(), bias


def _sums(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, bias: bool) -> Tensor:
    """The gradient, ``[nnz]``, and behind it the bias's, ``[O]``, if ``bias``."""
    where = gy.data_ptr(), x.data_ptr(), row_offsets.data_ptr(), columns.data_ptr()
    key = _key(gy, x, row_offsets, columns, bias)
    plan = _plans.find(key)
    if plan is not None:
        found: Tensor = plan.run(gy.device, *where)
        return found
    sums = torch.empty(columns.numel() + (gy.shape[1] if bias else 0), dtype=torch.float32, device=gy.device)
    with torch.cuda.device_of(gy):
        if prefer_product(columns.numel(), gy, x):
            rows = MOST_SPLITS * _most_rows(gy, x)  # of one launch
            for number, (gy_rows, x_rows) in enumerate(zip(gy.split(rows), x.split(rows), strict=True)):
                plan = launch_product(gy_rows, x_rows, row_offsets, columns, sums, bias, add=number > 0)
            if len(gy) > rows:
                plan = None  # more than one
        else:
            plan = launch_gather(gy, x, row_offsets, columns, sums, bias)
    if plan is not None:
        _plans.note(key, plan)
    return sums


def linear_gradients(
    gy: Tensor, x: Tensor, csr: Csr, wants_bias: bool, how: Recomputed | None
) -> tuple[Tensor, Tensor | None]:
    """:func:`.reference.linear_gradients` of an input that is there."""
    assert how is None, "inputs are computed again before the call"
    key: Hashable = None
    if gy.is_contiguous() and x.is_contiguous():  # what a layer's backward pass repeats is found before anything is reshaped
        where = gy.data_ptr(), x.data_ptr(), *csr.addresses
        key = "linear", gy.shape, gy.dtype, x.shape, x.dtype, csr.nnz, alignment(where), gy.get_device(), wants_bias
        plan = _plans.find(key)
        if plan is not None:
            sums: Tensor = plan.run(gy.device, *where)
            if not wants_bias:
                return sums, None
            grad, bias = sums.split_with_sizes((csr.nnz, gy.shape[-1]))
            return grad, bias
    rows = gy.reshape(-1, gy.shape[-1])
    if not rows.numel() or not csr.nnz:
        return torch.zeros(csr.nnz, device=gy.device), rows.sum(0) if wants_bias else None
    of_rows = rows, x.reshape(-1, x.shape[-1]), csr.row_offsets, csr.columns
    found = sampled_grad_with_bias(*of_rows) if wants_bias else (sampled_grad(*of_rows), None)
    plan = None if key is None else _plans.find(_key(*of_rows, wants_bias))
    if plan is not None:
        _plans.note(key, plan)
    return found


def prefer_product(nnz: int, gy: Tensor, x: Tensor) -> bool:
    """Whether whole tiles are likely quicker than gathering: from :func:`crossover` entries on."""
    return nnz >= crossover(gy, x)


def crossover(gy: Tensor, x: Tensor) -> float:
    """The number of entries at which both ways should take as long, by calculation.

    A tile costs the same whatever is selected in it. A gathered multiplication costs its lane of a load and its share of the
    sectors: a program reads each sector of a row of ``x`` once for all its entries, and no more sectors than it has entries.
    """
    O, C = gy.shape[1], x.shape[1]
    sectors = min(1.0, C * x.element_size() / 32 / GATHER_ENTRIES)
    tiled = O * -(-C // 64) * 64 / TILED_PER_GATHERED[2 if _multiplies_16_bit(gy, x) else 4]
    return tiled / (1 + sectors * GATHERED_PER_SECTOR)


def _multiplies_16_bit(gy: Tensor, x: Tensor) -> bool:
    if interpreted() and gy.dtype == torch.bfloat16:  # the interpreter would multiply the bits of bfloat16 as integers
        return False
    return gy.dtype == x.dtype and gy.dtype != torch.float32


def float32_precision(target: str) -> str:
    """How tiles multiply float32. Plain tf32 would keep 11 bits; three tf32 products keep 22, of numbers above 1e-34. AMD's
    matrix cores multiply float32 as it is, and Triton has no tf32x3 there."""
    return "tf32x3" if target.startswith("sm_") else "ieee"


def _most_rows(gy: Tensor, x: Tensor) -> int:
    return MOST_ROWS["short" if _multiplies_16_bit(gy, x) else float32_precision(target_of(gy.device))]


def launch_product(
    gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, sums: Tensor, bias: bool, add: bool
) -> Plan | None:
    """By tiles, for at most 64 times :data:`MOST_ROWS` rows; added to what is in ``sums`` if ``add``."""
    (M, O), C, nnz = gy.shape, x.shape[1], columns.numel()
    short, target = _multiplies_16_bit(gy, x), target_of(gy.device)
    # A wide tile reads gy, the larger side, less often. float32 tiles of that size would spill; before sm_90 all
    # would, by up to 2 KiB a thread with ptxas 12.9.
    wide = short and C > 64 and not target.startswith(("sm_7", "sm_8"))
    block_m, block_o, block_c = 32, 128, 128 if wide else 64
    if gy.stride(1) != 1 or gy.stride(0) % 16 or gy.data_ptr() % 16:  # an address for each number takes registers, too
        block_m, block_o, block_c = 16, 64, 64
    column_blocks, row_blocks = triton.cdiv(C, block_c), triton.cdiv(O, block_o)
    rows = min(_most_rows(gy, x), rows_per_split(M, column_blocks * row_blocks, PRODUCT_PROGRAMS, block_m))
    splits = triton.cdiv(M, rows)
    partials = sums if splits == 1 and not add else torch.empty(splits, len(sums), dtype=torch.float32, device=gy.device)
    # Column blocks first: those that read the same part of gy run at the same time.
    grid, numbers = (column_blocks + bias, row_blocks, splits), (M, O, C, nnz, *gy.stride(), *x.stride(), rows)
    compiled = launch(
        _product,
        grid,
        gy,
        x,
        row_offsets,
        columns,
        partials,
        *numbers,
        WIDEN=not short,
        PRECISION=float32_precision(target),
        SLOTS=8 if short and nnz > 4 * O else 4,
        BIAS=bias,
        BLOCK_M=block_m,
        BLOCK_O=block_o,
        BLOCK_C=block_c,
        num_warps=8,
        **AS_WRITTEN,
        num_stages=3 if short else 2,
    )
    return finish(compiled, grid, numbers, partials, sums, add)


def launch_gather(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, sums: Tensor, bias: bool) -> Plan | None:
    """By gathering."""
    (M, O), nnz = gy.shape, columns.numel()
    blocks = triton.cdiv(len(sums), GATHER_ENTRIES)
    rows = rows_per_split(M, blocks, GATHER_PROGRAMS, 2 * GATHER_ROWS)
    splits = triton.cdiv(M, rows)
    partials = sums if splits == 1 else torch.empty(splits, len(sums), dtype=torch.float32, device=gy.device)
    grid, numbers = (blocks, splits, 1), (M, O, nnz, *gy.stride(), *x.stride(), rows, O.bit_length())
    compiled = launch(
        _gather,
        grid,
        gy,
        x,
        row_offsets,
        columns,
        partials,
        *numbers,
        BIAS=bias,
        BLOCK_M=GATHER_ROWS,
        BLOCK_E=GATHER_ENTRIES,
        num_warps=4,
        **AS_WRITTEN,
        **register_limit(gy.device, 128),
    )
    return finish(compiled, grid, numbers, partials, sums)


def rows_per_split(M: int, tiles: int, programs: int, unit: int) -> int:
    """How many of ``M`` rows a program takes, a multiple of ``unit``: so few that ``tiles`` times the splits fill the GPU,
    but at least two units, and at most :data:`MOST_SPLITS` splits."""
    rows = max(-(-M // -(-programs // tiles)), -(-M // MOST_SPLITS), 2 * unit)
    return -(-rows // unit) * unit


@triton.jit(do_not_specialize=["nnz"])
def _product(
    gy_ptr,
    x_ptr,
    row_offsets_ptr,
    columns_ptr,
    partials_ptr,
    M,
    O,
    C,
    nnz,
    gy_stride_m,
    gy_stride_o,
    x_stride_m,
    x_stride_c,
    rows_per_split,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stage 1 of ``reference.sampled_grad`` by tiles: ``gy[:, outputs].T @ x[:, columns]`` of one split in registers, of
    which only the selected entries are stored. Each entry lies in one tile of each split, so it has one writer.

    Must move: ``gy`` and ``x`` once; of ``gy`` what other column blocks read, and of ``x`` what other row blocks read,
    comes from the L2 cache. The entries of an output are found anew by each program: 4 bytes each, beside which the tile's
    share of ``gy`` is large.
    """
    first_column = tl.program_id(0) * BLOCK_C
    outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)  # [BO]
    split = tl.program_id(2).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    begin = tl.load(row_offsets_ptr + outputs, mask=outputs < O, other=0)
    length = tl.load(row_offsets_ptr + outputs + 1, mask=outputs < O, other=0) - begin
    longest = tl.max(length, 0)
    results = nnz
    if BIAS:
        results += O
        longest = tl.where(first_column < C, longest, 0)  # beyond the columns is a program for the bias
    # Is there anything in this tile? Few steps: in rows with many entries the first ones tell.
    found = 0
    slot = 0
    while (slot < longest) & (found == 0):
        column = tl.load(
            columns_ptr + begin[:, None] + slot + slots[None, :],
            mask=(slot + slots)[None, :] < length[:, None],
            other=-1,
        )
        here = (column >= first_column) & (column < first_column + BLOCK_C)  # [BO, S]
        found = tl.max(tl.max(here.to(tl.int32), 1), 0)
        slot += SLOTS
    gy_column_ptr = gy_ptr + outputs.to(tl.int64)[:, None] * gy_stride_o
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    if found > 0:
        columns = first_column + tl.arange(0, BLOCK_C)  # [BC]
        x_column_ptr = x_ptr + columns.to(tl.int64)[None, :] * x_stride_c
        tile = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
        for start in range(first, last, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)  # [BM]
            gy = tl.load(
                gy_column_ptr + m[None, :] * gy_stride_m, mask=(outputs < O)[:, None] & (m < last)[None, :], other=0.0
            )  # [BO, BM]
            x = tl.load(
                x_column_ptr + m[:, None] * x_stride_m, mask=(m < last)[:, None] & (columns < C)[None, :], other=0.0
            )  # [BM, BC]
            if WIDEN:
                tile = tl.dot(to_float32(gy), to_float32(x), tile, input_precision=PRECISION)
            else:
                tile = tl.dot(gy, x, tile)
        for slot in range(0, longest, SLOTS):
            inside = (slot + slots)[None, :] < length[:, None]
            entries = begin[:, None] + slot + slots[None, :]  # [BO, S]
            column = tl.load(columns_ptr + entries, mask=inside, other=-1) - first_column
            here = (column >= 0) & (column < BLOCK_C)
            value = tl.gather(tile, tl.where(here, column, 0), 1)
            tl.store(partials_ptr + split * results + entries, value, mask=here)
    if BIAS:  # noqa: SIM102 - decided when it is compiled, unlike the next
        if first_column >= C:
            total = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
            for start in range(first, last, BLOCK_M):
                m = start + tl.arange(0, BLOCK_M)
                gy = tl.load(
                    gy_column_ptr + m[None, :] * gy_stride_m, mask=(outputs < O)[:, None] & (m < last)[None, :], other=0.0
                )
                total += to_float32(gy)
            tl.store(partials_ptr + split * results + nnz + outputs, tl.sum(total, 1), mask=outputs < O)


@triton.jit(do_not_specialize=["O", "nnz", "search_steps"])
def _gather(
    gy_ptr,
    x_ptr,
    row_offsets_ptr,
    columns_ptr,
    partials_ptr,
    M,
    O,
    nnz,
    gy_stride_m,
    gy_stride_o,
    x_stride_m,
    x_stride_c,
    rows_per_split,
    search_steps,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Stage 1 of ``reference.sampled_grad`` by gathering, for few entries.

    Must move: ``gy`` once, or its sectors that hold entries; of ``x`` at most a sector for each entry and row, from the L2
    cache where the L1 cache does not hold it. In float32 a thread adds 32 products in turn, then a tree adds 8: at most 36
    roundings, relative error below 2.3e-6. With ``BIAS`` there is one more entry for each output, multiplied by ones.
    """
    entries = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BE]
    split = tl.program_id(1).to(tl.int64)
    results = nnz
    rows = rows_of(row_offsets_ptr, entries, O, search_steps)
    chosen = entries < nnz
    if BIAS:
        results += O
        rows = tl.where(chosen, rows, entries - nnz)
    inside = entries < results
    columns = tl.load(columns_ptr + entries, mask=chosen, other=0).to(tl.int64)
    gy_column_ptr = gy_ptr + rows * gy_stride_o
    x_column_ptr = x_ptr + columns * x_stride_c
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    total = tl.zeros([BLOCK_E], tl.float64)
    for tile in range(first, last, 32 * BLOCK_M):
        part = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        for start in range(tile, tl.minimum(tile + 32 * BLOCK_M, last), BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)  # [BM]
            mask = (m < last)[:, None] & inside[None, :]
            gy = tl.load(gy_column_ptr[None, :] + m[:, None] * gy_stride_m, mask=mask, other=0.0)  # [BM, BE]
            mask &= chosen[None, :]
            x = tl.load(x_column_ptr[None, :] + m[:, None] * x_stride_m, mask=mask, other=1.0)  # [BM, BE]
            part = tl.fma(to_float32(gy), to_float32(x), part)
        total += tl.sum(part, 0).to(tl.float64)
    tl.store(partials_ptr + split * results + entries, total.to(tl.float32), mask=inside)
