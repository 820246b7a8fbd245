"""``masked_adamw_`` and ``scatter_values_``: writes to the selected entries of dense weights, and to nothing else.

A program serves 512 consecutive entries of one selection. Each entry finds its row by binary search in ``row_offsets``:
12 steps for 4096 rows, all of them cache hits after the first program, no barrier, and no assumption about the lengths
of rows. Walking the rows instead would be quick where they are long, but a run of empty rows makes a walk of any length.
"""

import math
from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.records import AdamWOptions, AdamWTensors
from fps_kernels.ops.triton.floats import bfloat16_bits, to_float32
from fps_kernels.ops.triton.launching import Compiled, launch
from fps_kernels.ops.triton.tables import Values, block_map, device_table
from fps_kernels.ops.triton.target import AS_WRITTEN

BLOCK = 512  # four entries per thread: the gathers wait for memory, so many warps matter more than wide loads
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FIELDS = tl.constexpr(19)


def masked_adamw_(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """:func:`fps_kernels.ops.reference.masked_adamw_` in one launch, without waiting for the device.

    The tables are made anew only when a tensor has moved or a number has changed. Under CUDA graph capture they must exist:
    see :func:`~fps_kernels.ops.triton.tables.device_table`.
    """
    lrs = options.lrs
    assert isinstance(lrs, Tensor)
    with torch.cuda.device_of(lrs):
        map_ = block_map(step_blocks(tensors.columns), lrs.device)
        table = device_table(tensor_fields(tensors), lrs.device)
        addresses = [grad.data_ptr() for grad in tensors.grads]
        values = changing_fields(addresses, options.weight_decays, options[2:5])
        changing = device_table(tuple(values.tolist()), lrs.device)
        launch_masked_adamw(table, changing, map_, lrs, *options[5:])


def scatter_values_(W: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> None:
    """:func:`fps_kernels.ops.reference.scatter_values_`."""
    with torch.cuda.device_of(W):
        launch_scatter_values(W, row_offsets, columns, values)


def launch_masked_adamw(
    tensors: Tensor,
    changing: Tensor,
    map_: Tensor,
    lrs: Tensor,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    zero_grads: bool,
) -> Compiled | None:
    return launch(
        _masked_adamw,
        (map_.numel(),),
        tensors,
        changing,
        map_,
        lrs,
        grad_scale,
        found_inf,
        lrs.numel(),
        MAXIMIZE=maximize,
        ZERO_GRADS=zero_grads,
        BLOCK=BLOCK,
        num_warps=4,
        **AS_WRITTEN,
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
        **AS_WRITTEN,
    )


def program_blocks(columns: list[Tensor]) -> tuple[tuple[int, int], ...]:
    """How many programs serve each selection, for :func:`~fps_kernels.ops.triton.tables.block_map`."""
    return tuple((i, triton.cdiv(c.numel(), BLOCK)) for i, c in enumerate(columns))


def step_blocks(columns: list[Tensor]) -> tuple[tuple[int, int], ...]:
    """:func:`program_blocks` of a step, which one program counts where there is nothing else to do."""
    return tuple((i, max(1, count)) for i, count in program_blocks(columns))


def entry_fields(W: Tensor, row_offsets: Tensor, columns: Tensor) -> tuple[int, ...]:
    """What every kernel here must know of the selected entries of one weight: the first of its fields."""
    csr = row_offsets.data_ptr(), columns.data_ptr(), W.shape[0], columns.numel()
    return (W.data_ptr(), *csr, *W.stride(), DTYPE_CODES[W.dtype], W.shape[0].bit_length())


def tensor_fields(tensors: AdamWTensors) -> tuple[int, ...]:
    """What stays from step to step: ``FIELDS`` numbers for each weight. The last is the device's, which counts with it."""
    table: list[int] = []
    for W, grad, row_offsets, columns, master, exp_avg, exp_avg_sq, count, agreed in zip(*tensors, strict=True):
        compact = grad.dim() == 1
        table += (
            *entry_fields(W, row_offsets, columns),
            master.data_ptr() if master.numel() else 0,
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            count.data_ptr(),
            *((0, 0) if compact else grad.stride()),
            int(compact),
            DTYPE_CODES[grad.dtype],
            agreed.data_ptr() if agreed.numel() else 0,
            0,
        )
    return tuple(table)


def changing_fields(
    grads: list[int], weight_decays: Sequence[float], numbers: tuple[float, float, float], lrs: Sequence[float] = ()
) -> Values:
    """What may differ from step to step: addresses of gradients, decays, and beta1, beta2, their logarithms and eps; from
    :func:`rates_offset` on the learning rates, where they are not a tensor.

    Compile-time or float32 arguments would cost a compilation or precision: float64 travels as its bits.
    """
    beta1, beta2, eps = numbers
    floats = array("d", (*weight_decays, beta1, beta2, _log(beta1), _log(beta2), eps, *((0.0, *lrs) if lrs else ())))
    values = array("q", grads)
    values.frombytes(floats.tobytes())
    return values


def rates_offset(n: int) -> int:
    """Where the learning rates of ``n`` tensors lie in the table, aligned as a tensor of their own would be."""
    return 2 * n + 6


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


@triton.jit
def one_by_one(BLOCK: tl.constexpr):
    """``0 .. BLOCK - 1``, neighbours in neighbouring threads.

    Where Triton knows that numbers follow one another, it gives a thread four of them, to load by 16 bytes. Masked by a
    number of entries that may end anywhere it loads them one after the other all the same, each time a quarter of the
    sectors' bytes. So it is told that no two follow one another.
    """
    return tl.max_contiguous(tl.arange(0, BLOCK), 1)


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
def store_any(address, offsets, value, code, inside):
    """The counterpart of :func:`_load_any`, rounding to nearest even."""
    if code == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, value, mask=inside)
    elif code == 1:
        tl.store(address.to(tl.pointer_type(tl.int16)) + offsets, bfloat16_bits(value), mask=inside)
    else:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offsets, value.to(tl.float16), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def _masked_adamw(
    tensors_ptr,
    changing_ptr,
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
    fields = tensors_ptr + tensor * FIELDS
    row_offsets_ptr = tl.load(fields + 1).to(tl.pointer_type(tl.int32))
    columns_ptr = tl.load(fields + 2).to(tl.pointer_type(tl.int32))
    master_address = tl.load(fields + 9)
    exp_avg_ptr = tl.load(fields + 10).to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = tl.load(fields + 11).to(tl.pointer_type(tl.float32))
    count_ptr = tl.load(fields + 12).to(tl.pointer_type(tl.float32))
    before = tl.load(count_ptr)
    count = before + 1.0
    step = count.to(tl.float64)
    grad_address = tl.load(changing_ptr + tensor)
    weight_decay = _float64(changing_ptr + tensors + tensor)
    constants = changing_ptr + tensors.to(tl.int64) * 2
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

    entries = (block & 0xFFFFFFFF) * BLOCK + one_by_one(BLOCK)  # [BLOCK] int64
    nnz = tl.load(fields + 4)
    programs = tl.maximum((nnz + BLOCK - 1) // BLOCK, 1)
    exists = entries < nnz
    if found_inf_ptr is not None:
        taken = tl.load(found_inf_ptr) == 0
        nnz = tl.where(taken, nnz, 0)  # a skipped step has no entries but to zero
        count = tl.where(taken, count, before)
    inside = entries < nnz
    rows = rows_of(row_offsets_ptr, entries, tl.load(fields + 3), tl.load(fields + 8))
    columns = tl.load(columns_ptr + entries, mask=exists, other=0).to(tl.int64)
    positions = rows * tl.load(fields + 5) + columns * tl.load(fields + 6)
    grad_positions = rows * tl.load(fields + 13) + columns * tl.load(fields + 14) + entries * tl.load(fields + 15)

    grad = _load_any(grad_address, grad_positions, tl.load(fields + 16), inside)
    if ZERO_GRADS:  # of a skipped step, too
        store_any(grad_address, grad_positions, tl.zeros_like(grad), tl.load(fields + 16), exists)
    if grad_scale_ptr is not None:
        grad = tl.div_rn(grad, tl.zeros_like(grad) + tl.load(grad_scale_ptr))
    if MAXIMIZE:
        grad = -grad
    if master_address != 0:
        value = tl.load(master_address.to(tl.pointer_type(tl.float32)) + entries, mask=inside, other=0.0)
    else:  # then the weight is float32
        value = tl.load(tl.load(fields).to(tl.pointer_type(tl.float32)) + positions, mask=inside, other=0.0)
    agreed_address = tl.load(fields + 17)
    if agreed_address != 0:  # a weight that was changed since both sides agreed counts, unless the value was as well
        agreed = tl.load(agreed_address.to(tl.pointer_type(tl.float32)) + entries, mask=inside, other=0.0)
        held = _load_any(tl.load(fields), positions, tl.load(fields + 7), inside)
        code = tl.load(fields + 7)
        rounded = agreed
        if code == 1:
            rounded = to_float32(bfloat16_bits(agreed).to(tl.bfloat16, bitcast=True))
        elif code == 2:
            rounded = agreed.to(tl.float16).to(tl.float32)
        same_value = value.to(tl.int32, bitcast=True) == agreed.to(tl.int32, bitcast=True)
        same_weight = held.to(tl.int32, bitcast=True) == rounded.to(tl.int32, bitcast=True)
        value = tl.where(same_value & (same_weight == 0), held, value)
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
    if agreed_address != 0:
        tl.store(agreed_address.to(tl.pointer_type(tl.float32)) + entries, value, mask=inside)
    store_any(tl.load(fields), positions, value, tl.load(fields + 7), inside)

    # The last of the tensor's programs writes the count: by then all have read it, each in all its threads.
    tl.debug_barrier()
    if tl.atomic_add(fields + 18, 1) == programs - 1:
        tl.store(fields + 18, 0)
        tl.store(count_ptr, count)


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
    entries = tl.program_id(0).to(tl.int64) * BLOCK + one_by_one(BLOCK)  # [BLOCK]
    inside = entries < nnz
    rows = rows_of(row_offsets_ptr, entries, O, search_steps)
    columns = tl.load(columns_ptr + entries, mask=inside, other=0).to(tl.int64)
    value = to_float32(tl.load(values_ptr + entries, mask=inside, other=0.0))
    pointers = W_ptr + rows * stride_o + columns * stride_c
    if W_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, bfloat16_bits(value).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(pointers, value.to(W_ptr.dtype.element_ty), mask=inside)
