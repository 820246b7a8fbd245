"""``agree_values_``: reads values, weights and what both agreed on last, and writes where they differ."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.records import Agreement
from fps_kernels.ops.triton.floats import bfloat16_bits
from fps_kernels.ops.triton.launching import Compiled, launch
from fps_kernels.ops.triton.tables import block_map, device_table
from fps_kernels.ops.triton.target import AS_WRITTEN
from fps_kernels.ops.triton.updates import BLOCK, entry_fields, one_by_one, program_blocks, rows_of, store_any

FIELDS = tl.constexpr(11)


def agree_values_(agreement: Agreement) -> None:
    """:func:`fps_kernels.ops.reference.agree_values_` in one launch, without waiting for the device."""
    device = agreement.weights[0].device
    with torch.cuda.device_of(agreement.weights[0]):
        map_ = block_map(program_blocks(agreement.columns), device)
        launch_agree_values(device_table(agreement_fields(agreement), device), map_, 0, map_.numel())


def agreement_fields(agreement: Agreement) -> tuple[int, ...]:
    """``FIELDS`` numbers for each weight."""
    table: list[int] = []
    for W, row_offsets, columns, values, agreed in zip(*agreement, strict=True):
        table += (*entry_fields(W, row_offsets, columns), values.data_ptr(), agreed.data_ptr())
    return tuple(table)


def launch_agree_values(table: Tensor, map_: Tensor, first: int, programs: int) -> Compiled | None:
    """Those programs of the map, from the first on."""
    return (
        launch(_agree_values, (programs,), table, map_, first, BLOCK=BLOCK, num_warps=4, **AS_WRITTEN) if programs else None
    )


@triton.jit(do_not_specialize=["first"])
def _agree_values(table_ptr, map_ptr, first, BLOCK: tl.constexpr):
    """``reference.agree_values_`` on entries scattered over many tensors.

    Must move, per entry: 12 bytes of column, value and agreed value, and the sector (32 bytes) that holds its weight.
    """
    block = tl.load(map_ptr + first + tl.program_id(0))  # tensor << 32 | number of the program within it
    fields = table_ptr + (block >> 32) * FIELDS
    address = tl.load(fields)
    row_offsets_ptr = tl.load(fields + 1).to(tl.pointer_type(tl.int32))
    columns_ptr = tl.load(fields + 2).to(tl.pointer_type(tl.int32))
    code = tl.load(fields + 7)
    values_ptr = tl.load(fields + 9).to(tl.pointer_type(tl.float32))
    agreed_ptr = tl.load(fields + 10).to(tl.pointer_type(tl.float32))

    entries = (block & 0xFFFFFFFF) * BLOCK + one_by_one(BLOCK)  # [BLOCK] int64
    inside = entries < tl.load(fields + 4)
    rows = rows_of(row_offsets_ptr, entries, tl.load(fields + 3), tl.load(fields + 8))
    columns = tl.load(columns_ptr + entries, mask=inside, other=0).to(tl.int64)
    positions = rows * tl.load(fields + 5) + columns * tl.load(fields + 6)
    value = tl.load(values_ptr + entries, mask=inside, other=0.0)
    agreed = tl.load(agreed_ptr + entries, mask=inside, other=0.0)
    agreed_bits = agreed.to(tl.int32, bitcast=True)
    if code == 0:
        held_bits = tl.load(address.to(tl.pointer_type(tl.int32)) + positions, mask=inside, other=0)
        held = held_bits.to(tl.float32, bitcast=True)
        rounded_bits = agreed_bits
    elif code == 1:
        half = tl.load(address.to(tl.pointer_type(tl.int16)) + positions, mask=inside, other=0)
        held_bits = half.to(tl.int32)
        held = (held_bits << 16).to(tl.float32, bitcast=True)
        rounded_bits = bfloat16_bits(agreed).to(tl.int32)
    else:
        half = tl.load(address.to(tl.pointer_type(tl.int16)) + positions, mask=inside, other=0)
        held_bits = half.to(tl.int32)
        held = half.to(tl.float16, bitcast=True).to(tl.float32)
        rounded_bits = agreed.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)

    changed = inside & (value.to(tl.int32, bitcast=True) != agreed_bits)
    # Rounding does not give back every NaN: one that was taken over before is not written again.
    taken = inside & ~changed & (held_bits != rounded_bits) & (held.to(tl.int32, bitcast=True) != agreed_bits)
    store_any(address, positions, value, code, changed)
    tl.store(values_ptr + entries, held, mask=taken)
    tl.store(agreed_ptr + entries, tl.where(changed, value, held), mask=changed | taken)
