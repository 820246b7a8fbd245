"""``sampled_grad_conv2d``: a convolution's gradient at its selected entries, each through its own window of the input."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.records import Convolution
from fps_kernels.ops.triton.floats import to_float32
from fps_kernels.ops.triton.gradients import GATHER_PROGRAMS, rows_per_split
from fps_kernels.ops.triton.launching import Plans, alignment, launch
from fps_kernels.ops.triton.splits import Plan, finish
from fps_kernels.ops.triton.target import AS_WRITTEN, register_limit
from fps_kernels.ops.triton.updates import rows_of

TILE = 1024

_plans = Plans()


def sampled_grad_conv2d(
    gy: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    convolution: Convolution,
) -> Tensor:
    """:func:`fps_kernels.ops.reference.sampled_grad_conv2d`. Workspace: 64 float32 numbers per entry."""
    where = gy.data_ptr(), x.data_ptr(), row_offsets.data_ptr(), columns.data_ptr()
    kinds = gy.shape, gy.stride(), gy.dtype, x.shape, x.stride(), x.dtype, columns.shape, convolution
    key = kinds, alignment(where), gy.get_device()
    plan = _plans.find(key)
    if plan is not None:
        found: Tensor = plan.run(gy.device, *where)
        return found
    grad = torch.empty(columns.numel(), dtype=torch.float32, device=gy.device)
    with torch.cuda.device_of(gy):
        plan = launch_gather_windows(gy, x, row_offsets, columns, convolution, grad)
    if plan is not None:
        _plans.note(key, plan)
    return grad


def launch_gather_windows(
    gy: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    convolution: Convolution,
    grad: Tensor,
) -> Plan | None:
    """Into ``grad`` ``[nnz]``. What is split is the lines of the output, ``B * P`` of them."""
    B, O, P, Q = gy.shape
    nnz = columns.numel()
    # Neighbouring lanes take neighbours in memory: channels, hence entries, or positions in a line.
    by_entries = gy.stride(1) == 1 and O > 1 and gy.stride(3) != 1
    block_e = 32 if by_entries else 16
    block_q = min(TILE // block_e, triton.next_power_of_2(Q))
    lines = TILE // block_e // block_q
    blocks = triton.cdiv(nnz, block_e)
    per_split = rows_per_split(B * P, blocks, GATHER_PROGRAMS, lines)
    splits = triton.cdiv(B * P, per_split)
    partials = grad if splits == 1 else torch.empty(splits, nnz, dtype=torch.float32, device=gy.device)
    numbers = (
        B * P,
        P,
        Q,
        O,
        x.shape[2],
        x.shape[3],
        nnz,
        *gy.stride(),
        *x.stride(),
        *convolution.kernel_size,
        *convolution.stride,
        convolution.padding[0],
        convolution.padding[2],
        *convolution.dilation,
        O // convolution.groups,
        x.shape[1] // convolution.groups,
        per_split,
        O.bit_length(),
    )
    compiled = launch(
        _gather_windows,
        (blocks, splits),
        gy,
        x,
        row_offsets,
        columns,
        partials,
        *numbers,
        BY_ENTRIES=by_entries,
        LINES=lines,
        BLOCK_Q=block_q,
        BLOCK_E=block_e,
        num_warps=4,
        **AS_WRITTEN,
        **register_limit(gy.device, 192),
    )
    return finish(compiled, (blocks, splits, 1), numbers, partials, grad)


@triton.jit
def _within(index, size):
    """Whether ``0 <= index < size``, in one comparison: as unsigned numbers, negative ones are large."""
    return index.to(tl.uint32, bitcast=True) < size.to(tl.uint32)


@triton.jit(do_not_specialize=["O", "H", "W", "nnz", "search_steps"])
def _gather_windows(
    gy_ptr,
    x_ptr,
    row_offsets_ptr,
    columns_ptr,
    partials_ptr,
    all_lines,
    P,
    Q,
    O,
    H,
    W,
    nnz,
    gy_stride_b,
    gy_stride_o,
    gy_stride_p,
    gy_stride_q,
    x_stride_b,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    kh,
    kw,
    step_h,
    step_w,
    top,
    left,
    spread_h,
    spread_w,
    outputs_per_group,
    channels_per_group,
    lines_per_split,
    search_steps,
    BY_ENTRIES: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Stage 1 of ``reference.sampled_grad_conv2d``: for each entry ``(o, c, u, v)`` the sum over images and positions of
    ``gy[b, o, p, q] * x[b, c, p * step_h - top + u * spread_h, q * step_w - left + v * spread_w]``, zero outside.

    Must move: ``gy`` and ``x`` once, or what of them the entries name; windows that overlap hit the caches. In float32 a
    thread adds at most 32 products in turn, then a tree adds at most 128: at most 40 roundings, relative error below 2.4e-6.
    """
    AXIS: tl.constexpr = 0 if BY_ENTRIES else 1  # that of the positions
    entry = tl.arange(0, BLOCK_E)
    position = tl.arange(0, LINES * BLOCK_Q)
    entry = tl.expand_dims(entry, AXIS)  # [1, E] or [E, 1]
    position = tl.expand_dims(position, 1 - AXIS)  # [N, 1] or [1, N]
    split = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + entry
    inside = entry < nnz
    o = rows_of(row_offsets_ptr, entry, O, search_steps)
    column = tl.load(columns_ptr + entry, mask=inside, other=0)
    v = column % kw * spread_w
    u = column // kw % kh * spread_h
    c = column // kw // kh + (o // outputs_per_group) * channels_per_group
    gy_entry_ptr = gy_ptr + o * gy_stride_o
    x_entry_ptr = x_ptr + c * x_stride_c + u.to(tl.int64) * x_stride_h + v.to(tl.int64) * x_stride_w
    first = split * lines_per_split
    last = tl.minimum(first + lines_per_split, all_lines)
    total = tl.zeros([BLOCK_E], tl.float64)
    for first_q in range(0, Q, BLOCK_Q):
        q = first_q + position % BLOCK_Q
        w = q * step_w - left
        inside_w = (q < Q) & _within(w + v, W)
        for tile in range(first, last, 32 * LINES):
            if BY_ENTRIES:
                part = tl.zeros([LINES * BLOCK_Q, BLOCK_E], tl.float32)
            else:
                part = tl.zeros([BLOCK_E, LINES * BLOCK_Q], tl.float32)
            for start in range(tile, tl.minimum(tile + 32 * LINES, last), LINES):
                first_b = start // P
                line = (start - first_b * P).to(tl.int32) + position // BLOCK_Q  # counted from the first of that image
                b = first_b + line // P
                p = line % P
                h = p * step_h - top
                inside_line = start + position // BLOCK_Q < last
                mask = inside_w & inside_line & _within(h + u, H) & inside
                gy_position = b * gy_stride_b + p.to(tl.int64) * gy_stride_p + q.to(tl.int64) * gy_stride_q
                x_position = b * x_stride_b + h.to(tl.int64) * x_stride_h + w.to(tl.int64) * x_stride_w
                gy = tl.load(gy_entry_ptr + gy_position, mask=mask, other=0.0)
                x = tl.load(x_entry_ptr + x_position, mask=mask, other=0.0)
                part = tl.fma(to_float32(gy), to_float32(x), part)
            total += tl.sum(part, AXIS).to(tl.float64)
    entries = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    tl.store(partials_ptr + split * nnz + entries, total.to(tl.float32), mask=entries < nnz)
