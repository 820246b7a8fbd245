"""The entries of many tensors in one launch for each kind of tensor (dtype, alignment, wide or narrow), normally one in all:
a table of pointers says where the tensors are, a map gives each program its rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.factors import share_factors
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
