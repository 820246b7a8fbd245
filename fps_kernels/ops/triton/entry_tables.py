"""The entries of many tensors in one launch for each kind of tensor (dtype, alignment, wide or narrow), normally one in all:
a table of pointers says where the tensors are, a map gives each program its rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.factors import factors_by_row, share_factors, shared_factors
from fps_kernels.ops.triton.floats import score_key
from fps_kernels.ops.triton.tables import block_map, device_table
from fps_kernels.ops.triton.target import AS_WRITTEN, register_limit

# Many entries per program make flushing its counters cheap; few keep all SMs busy where there is one small tensor.
LEAST_ENTRIES, MOST_ENTRIES = 4096, 65536
TARGET_PROGRAMS = 528  # four for each SM of an H100
FIELDS = tl.constexpr(8)  # of a tensor in the table
_TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Kind:
    """What a kernel must know of a tensor at compile time."""

    dtype: torch.dtype
    aligned: bool  # 16-byte loads: unit column stride, everything divisible
    shared: bool  # the rows of a tile have the same factors
    tile: tuple[int, int]


def _kind(W: Tensor, a: Tensor) -> Kind:
    aligned = W.stride(1) == 1 and all(n % 16 == 0 for n in (W.data_ptr(), a.data_ptr(), W.stride(0), W.shape[1]))
    tile = (64, 32) if W.shape[1] <= 64 else (16, 256)
    return Kind(W.dtype, aligned, share_factors(W, a, tile[0]), tile)


def entry_tables(weights: list[Tensor], factors: list[Tensor]) -> tuple[Tensor, dict[Kind, Tensor]]:
    """The table of all tensors, and for each kind among them the programs' map."""
    device = weights[0].device
    kinds: dict[Kind, list[int]] = {}
    table: list[int] = []
    rows_per_program: list[int] = []
    total = sum(W.numel() for W in weights)
    entries = min(MOST_ENTRIES, max(LEAST_ENTRIES, total // TARGET_PROGRAMS))
    for i, (W, a) in enumerate(zip(weights, factors, strict=True)):
        kind = _kind(W, a)
        if W.numel():
            kinds.setdefault(kind, []).append(i)
        rows = kind.tile[0] * max(1, entries // (kind.tile[0] * max(1, W.shape[1])))  # whole tiles
        rows_per_program.append(rows)
        table += (W.data_ptr(), a.data_ptr(), *W.shape, *W.stride(), max(1, W.shape[0] // a.shape[0]), rows)
    maps = {
        kind: block_map(tuple((i, triton.cdiv(weights[i].shape[0], rows_per_program[i])) for i in members), device)
        for kind, members in kinds.items()
    }
    return device_table(tuple(table), device), maps


def options_of(kind: Kind, device: torch.device) -> dict[str, Any]:
    """What a launch over the tensors of a kind is compiled with."""
    return {
        "DTYPE": _TL_DTYPES[kind.dtype],
        "ALIGNED": kind.aligned,
        "SHARED": kind.shared,
        "BLOCK_R": kind.tile[0],
        "BLOCK_C": kind.tile[1],
        "num_warps": 8 if kind.tile[0] * kind.tile[1] > 2048 else 4,
        **AS_WRITTEN,
        **register_limit(device, 255),
    }


@triton.jit
def tensor_of_program(table_ptr, map_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Which tensor a program has rows of, which of its rows is the first, and the fields of the table."""
    entry = tl.load(map_ptr + tl.program_id(0))  # tensor << 32 | number of the program within it
    tensor = entry >> 32
    fields = table_ptr + tensor * FIELDS
    W_ptr = tl.load(fields).to(tl.pointer_type(DTYPE))
    a_ptr = tl.load(fields + 1).to(tl.pointer_type(tl.float32))
    O = tl.load(fields + 2).to(tl.int32)
    C = tl.load(fields + 3).to(tl.int32)
    stride_o = tl.load(fields + 4)
    stride_c = tl.load(fields + 5)
    rows_per_group = tl.load(fields + 6).to(tl.int32)
    rows_per_program = tl.load(fields + 7).to(tl.int32)
    if ALIGNED:  # promises that hold for this kind of tensor; nothing is known of numbers read from a table
        W_ptr = tl.multiple_of(W_ptr, 16)
        a_ptr = tl.multiple_of(a_ptr, 16)
        stride_o = tl.multiple_of(stride_o, 16)
        C = tl.multiple_of(C, 16)
        stride_c = 1
    first = entry.to(tl.int32) * rows_per_program
    return tensor, first, W_ptr, a_ptr, O, C, stride_o, stride_c, rows_per_group, rows_per_program


@triton.jit
def tile_keys(
    W_ptr,
    a_ptr,
    rows,
    first_row,
    start,
    O,
    C,
    stride_o,
    stride_c,
    rows_per_group,
    SHARED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The keys ``[R, C]`` of some rows from column ``start`` on, -1 outside the matrix, and the columns."""
    columns = start + tl.arange(0, BLOCK_C)
    inside = (rows < O)[:, None] & (columns < C)[None, :]
    w = tl.load(W_ptr + rows[:, None] * stride_o + columns.to(tl.int64)[None, :] * stride_c, mask=inside, other=0.0)
    if SHARED:
        key = score_key(w, shared_factors(a_ptr, first_row, columns, C, rows_per_group))
    else:
        key = score_key(w, factors_by_row(a_ptr, rows, columns, O, C, rows_per_group))
    return tl.where(inside, key, -1), columns
