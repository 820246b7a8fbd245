"""The native ops that keep numbers in 8 or 4 bits. Definitions: :mod:`.reference`."""

import torch
from torch import Tensor

from fps_kernels.ops.native_library import DTYPES, check, library, table
from fps_kernels.ops.packing import MOST_DIMENSIONS, empty_packed


def pack_groups(x: Tensor, bits: int, key: int | None) -> tuple[Tensor, Tensor]:
    """:func:`.reference.pack_groups` in one read of ``x``, of up to four dimensions and any strides."""
    codes, scales = empty_packed(x, bits)
    pack_groups_into(x, bits, key, codes, scales)
    return codes, scales


def pack_groups_into(x: Tensor, bits: int, key: int | None, codes: Tensor, scales: Tensor) -> None:
    """:func:`pack_groups` with results in memory that is there."""
    missing = MOST_DIMENSIONS - x.dim()  # of `Numbers` in csrc/kernels.h
    numbers = table((x.data_ptr(), *(1,) * missing, *x.shape, *(0,) * missing, *x.stride(), DTYPES[x.dtype]))
    rounding = -1 if key is None else key
    check(library().fps_pack_groups(numbers, bits, rounding, codes.data_ptr(), scales.data_ptr(), torch.get_num_threads()))


def unpack_groups(codes: Tensor, scales: Tensor, out: Tensor, bits: int) -> None:
    """:func:`.reference.unpack_groups` in one write of ``out`` ``[n]``, contiguous."""
    status = library().fps_unpack_groups(
        codes.data_ptr(),
        scales.data_ptr(),
        bits,
        out.data_ptr(),
        out.numel(),
        DTYPES[out.dtype],
        torch.get_num_threads(),
    )
    check(status)
