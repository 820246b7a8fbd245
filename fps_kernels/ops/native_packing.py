"""The native ops that keep numbers in 8 or 4 bits. Definitions: :mod:`.reference`."""

import torch
from torch import Tensor

from fps_kernels.ops.native_library import DTYPES, check, library, table

_CPU = torch.device("cpu")  # with another default device, what is made would lie elsewhere
_GROUP, _DIMENSIONS = 32, 4  # `GROUP` in csrc/ops/pack_groups.cpp, of `Numbers` in csrc/kernels.h


def pack_groups(x: Tensor, bits: int, key: int | None) -> tuple[Tensor, Tensor]:
    """:func:`.reference.pack_groups` in one read of ``x``, of up to four dimensions and any strides."""
    n = x.numel()
    codes = torch.empty(-(-n * bits // 8), dtype=torch.uint8, device=_CPU)
    scales = torch.empty(-(-n // _GROUP), 2, dtype=torch.bfloat16, device=_CPU)
    missing = _DIMENSIONS - x.dim()
    numbers = table((x.data_ptr(), *(1,) * missing, *x.shape, *(0,) * missing, *x.stride(), DTYPES[x.dtype]))
    rounding = -1 if key is None else key
    check(library().fps_pack_groups(numbers, bits, rounding, codes.data_ptr(), scales.data_ptr(), torch.get_num_threads()))
    return codes, scales


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
