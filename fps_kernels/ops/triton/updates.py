"""``masked_adamw_`` and ``scatter_values_``: writes to the selected entries of dense weights, and to nothing else.

A program serves 512 consecutive entries of one selection. Each entry finds its row by binary search in ``row_offsets``:
12 steps for 4096 rows, all of them cache hits after the first program, no barrier, and no assumption about the lengths
of rows. Walking the rows instead would be quick where they are long, but a run of empty rows makes a walk of any length.
"""

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.records import AdamWStep
from fps_kernels.ops.triton.floats import bfloat16_bits, to_float32
from fps_kernels.ops.triton.tables import block_map, device_table

BLOCK = 512  # four entries per thread: the gathers wait for memory, so many warps matter more than wide loads
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FIELDS = tl.constexpr(19)


def masked_adamw_(step: AdamWStep) -> None:
    """:func:`fps_kernels.ops.reference.masked_adamw_` in one launch, without waiting for the device.

    The table of pointers is made anew only when a tensor has moved. Under CUDA graph capture it must exist: see
    :func:`~fps_kernels.ops.triton.tables.device_table`.
    """
    lrs = step.lrs
    with torch.cuda.device_of(lrs):
        table: list[int] = []
        for W, grad, offsets, cols, master, exp_avg, exp_avg_sq, count, decay in zip(
            *step[:8], step.weight_decays, strict=True
        ):
            compact = grad.dim() == 1
            table += (
                W.data_ptr(),
                grad.data_ptr(),
                offsets.data_ptr(),
                cols.data_ptr(),
                master.data_ptr() if master.numel() else 0,
                exp_avg.data_ptr(),
                exp_avg_sq.data_ptr(),
                count.data_ptr(),
                W.shape[0],
                cols.numel(),
                *W.stride(),
                *((0, 0) if compact else grad.stride()),
                int(compact),
                DTYPE_CODES[W.dtype],
                DTYPE_CODES[grad.dtype],
                _float64_bits(decay),
                W.shape[0].bit_length(),
            )
        # Compile-time or float32 arguments would cost a compilation or precision: float64 travels as its bits.
        table += map(_float64_bits, (step.beta1, step.beta2, _log(step.beta1), _log(step.beta2), step.eps))
        pointers = device_table(tuple(table), lrs.device)
        map_ = block_map(tuple((i, triton.cdiv(c.numel(), BLOCK)) for i, c in enumerate(step.columns)), lrs.device)
        if step.found_inf is None:
            torch._foreach_add_(step.steps, 1.0)
        else:
            clean = (step.found_inf == 0).to(torch.float32).reshape(())
            torch._foreach_add_(step.steps, [clean] * len(step.steps))  # as a list: never read by the host
        if map_.numel():
            launch_masked_adamw(pointers, map_, step)


def scatter_values_(W: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> None:
    """:func:`fps_kernels.ops.reference.scatter_values_`."""
    with torch.cuda.device_of(W):
        launch_scatter_values(W, row_offsets, columns, values)


def launch_masked_adamw(pointers: Tensor, map_: Tensor, step: AdamWStep) -> None:
    _masked_adamw[(map_.numel(),)](
        pointers,
        map_,
        step.lrs,
        step.grad_scale,
        step.found_inf,
        step.lrs.numel(),
        MAXIMIZE=step.maximize,
        ZERO_GRADS=step.zero_grads,
        BLOCK=BLOCK,
        num_warps=4,
    )


def launch_scatter_values(W: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> None:
    _scatter_values[(triton.cdiv(columns.numel(), BLOCK),)](
        W,
        row_offsets,
        columns,
        values,
        W.shape[0],
        columns.numel(),
        W.stride(0),
        W.stride(1),
        W.shape[0].bit_length(),
        BLOCK=BLOCK,
        num_warps=4,
    )


def _float64_bits(value: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


@triton.jit
def rows_of(row_offsets_ptr, entries, O, search_steps):
    """The row of each entry ``[BLOCK]``: the last whose offset does not exceed the entry, so empty rows drop out."""
    entries = entries.to(tl.int32)  # what wraps around lies past the last entry, and is masked
    low = tl.zeros_like(entries)  # row_offsets[low] <= entry
    high = low + O.to(tl.int32)  # row_offsets[high] > entry
    for _ in range(search_steps):
        middle = low + ((high - low) >> 1)
        right = tl.load(row_offsets_ptr + middle) <= entries
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low.to(tl.int64)


@triton.jit
def _float64(table_ptr):
    return tl.load(table_ptr).to(tl.float64, bitcast=True)


@triton.jit
def _load_any(address, offsets, code, inside):
    """float32 values at ``offsets`` of a tensor known by its address and the code of its dtype."""
    if code == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=inside, other=0.0)
    elif code == 1:
        value = to_float32(tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=inside, other=0.0))
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _store_any(address, offsets, value, code, inside):
    """The counterpart of :func:`_load_any`, rounding to nearest even."""
    if code == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, value, mask=inside)
    elif code == 1:
        tl.store(address.to(tl.pointer_type(tl.int16)) + offsets, bfloat16_bits(value), mask=inside)
    else:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offsets, value.to(tl.float16), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def _masked_adamw(
    table_ptr,
    map_ptr,
    lrs_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    tensors,
    MAXIMIZE: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``reference.masked_adamw_``: AdamW (Loshchilov & Hutter 2019, algorithm 2) in the order of operations of
    ``torch.optim.AdamW``, on entries scattered over many tensors.

    Must move, per entry: 4 bytes of column, the moments in and out (16), the master in and out (8, where there is one),
    and the sectors (32 bytes each) that hold its gradient and its weight, the weight's also back, as the gradient's if it
    is set to zero.
    """
    block = tl.load(map_ptr + tl.program_id(0))  # tensor << 32 | number of the program within it
    tensor = block >> 32
    fields = table_ptr + tensor * FIELDS
    grad_address = tl.load(fields + 1)
    row_offsets_ptr = tl.load(fields + 2).to(tl.pointer_type(tl.int32))
    columns_ptr = tl.load(fields + 3).to(tl.pointer_type(tl.int32))
    master_address = tl.load(fields + 4)
    exp_avg_ptr = tl.load(fields + 5).to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = tl.load(fields + 6).to(tl.pointer_type(tl.float32))
    step = tl.load(tl.load(fields + 7).to(tl.pointer_type(tl.float32))).to(tl.float64)
    weight_decay = _float64(fields + 17)
    constants = table_ptr + tensors.to(tl.int64) * FIELDS
    beta1 = _float64(constants)
    beta2 = _float64(constants + 1)
    eps = _float64(constants + 4).to(tl.float32)
    lr = tl.load(lrs_ptr + tensor)

    # Scalars in float64, each rounded once to what multiplies float32 numbers.
    decay = (1.0 - lr * weight_decay).to(tl.float32)
    toward = (1.0 - beta1).to(tl.float32)
    keep = beta2.to(tl.float32)
    add = (1.0 - beta2).to(tl.float32)
    bias_correction1 = 1.0 - tl.exp(step * _float64(constants + 2))
    bias_correction2 = 1.0 - tl.exp(step * _float64(constants + 3))
    root_correction = tl.sqrt(bias_correction2).to(tl.float32)
    step_size = (-lr / bias_correction1).to(tl.float32)

    entries = (block & 0xFFFFFFFF) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
    nnz = tl.load(fields + 9)
    exists = entries < nnz
    if found_inf_ptr is not None:
        nnz = tl.where(tl.load(found_inf_ptr) == 0, nnz, 0)  # a skipped step has no entries but to zero
    inside = entries < nnz
    rows = rows_of(row_offsets_ptr, entries, tl.load(fields + 8), tl.load(fields + 18))
    columns = tl.load(columns_ptr + entries, mask=exists, other=0).to(tl.int64)
    positions = rows * tl.load(fields + 10) + columns * tl.load(fields + 11)
    grad_positions = rows * tl.load(fields + 12) + columns * tl.load(fields + 13) + entries * tl.load(fields + 14)

    grad = _load_any(grad_address, grad_positions, tl.load(fields + 16), inside)
    if ZERO_GRADS:  # of a skipped step, too
        _store_any(grad_address, grad_positions, tl.zeros_like(grad), tl.load(fields + 16), exists)
    if grad_scale_ptr is not None:
        grad = tl.div_rn(grad, tl.zeros_like(grad) + tl.load(grad_scale_ptr))
    if MAXIMIZE:
        grad = -grad
    if master_address != 0:
        value = tl.load(master_address.to(tl.pointer_type(tl.float32)) + entries, mask=inside, other=0.0)
    else:  # then the weight is float32
        value = tl.load(tl.load(fields).to(tl.pointer_type(tl.float32)) + positions, mask=inside, other=0.0)
    value = value * decay
    exp_avg = tl.load(exp_avg_ptr + entries, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + entries, mask=inside, other=0.0)
    if toward < 0.5:  # both sides of torch.lerp, which stays exact at either end
        exp_avg = exp_avg + toward * (grad - exp_avg)
    else:
        exp_avg = grad - (grad - exp_avg) * (1.0 - toward)
    exp_avg_sq = exp_avg_sq * keep + add * grad * grad
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.zeros_like(grad) + root_correction) + eps
    value = value + step_size * tl.div_rn(exp_avg, denominator)

    tl.store(exp_avg_ptr + entries, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + entries, exp_avg_sq, mask=inside)
    if master_address != 0:
        tl.store(master_address.to(tl.pointer_type(tl.float32)) + entries, value, mask=inside)
    _store_any(tl.load(fields), positions, value, tl.load(fields + 15), inside)


@triton.jit(do_not_specialize=["O", "nnz", "search_steps"])
def _scatter_values(
    W_ptr,
    row_offsets_ptr,
    columns_ptr,
    values_ptr,
    O,
    nnz,
    stride_o,
    stride_c,
    search_steps,
    BLOCK: tl.constexpr,
):
    """``reference.scatter_values_``. Must move, per entry: its column, its value, and the sector of ``W`` it goes to."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = entries < nnz
    rows = rows_of(row_offsets_ptr, entries, O, search_steps)
    columns = tl.load(columns_ptr + entries, mask=inside, other=0).to(tl.int64)
    value = to_float32(tl.load(values_ptr + entries, mask=inside, other=0.0))
    pointers = W_ptr + rows * stride_o + columns * stride_c
    if W_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, bfloat16_bits(value).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(pointers, value.to(W_ptr.dtype.element_ty), mask=inside)
