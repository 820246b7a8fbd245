"""``pack_groups`` and ``unpack_groups``: one read, one write, 32 numbers a row of a tile.

A program serves 64 groups, a thread 16 numbers: of dense tensors it reads 16 bytes at a time. Minimum and step of a group
are the halves of one 32-bit number, so that both are one store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.floats import bfloat16_bits, magnitude_bits, to_float32
from fps_kernels.ops.triton.target import AS_WRITTEN

GROUP = tl.constexpr(32)
BLOCK_G = 64  # groups a program
INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
SMALLEST_STEP = tl.constexpr(2.0**-126)
UPPER_HALF = tl.constexpr(-65536)
# How numbers lie in memory: one behind the other; groups whole, each at an address that a thread can have 16 bytes from;
# anyhow.
DENSE, ALIGNED, ANY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def pack_groups(x: Tensor, bits: int, key: int | None) -> tuple[Tensor, Tensor]:
    """:func:`fps_kernels.ops.reference.pack_groups` of up to four dimensions and any strides, without waiting for the
    device."""
    n = x.numel()
    codes = torch.empty(-(-n * bits // 8), dtype=torch.uint8, device=x.device)
    scales = torch.empty(-(-n // 32), 2, dtype=torch.bfloat16, device=x.device)
    missing = 4 - x.dim()
    shape, strides = (1,) * missing + tuple(x.shape), (0,) * missing + x.stride()
    whole_groups = strides[3] == 1 and shape[3] % 32 == 0
    aligned = all(stride % 16 == 0 for stride in strides[:3])
    layout = DENSE if n == shape[3] and strides[3] == 1 else ALIGNED if whole_groups and aligned else ANY
    signed = 0 if key is None else key - (key >> 31 << 32)  # one dtype for all keys
    with torch.cuda.device_of(x):
        _pack_groups[(triton.cdiv(scales.shape[0], BLOCK_G),)](
            x,
            codes,
            scales.view(torch.int32),
            n,
            codes.numel(),
            signed,
            *shape[1:],
            *strides,
            LAYOUT=layout,
            BITS=bits,
            STOCHASTIC=key is not None,
            BLOCK_G=BLOCK_G,
            num_warps=4,
            **AS_WRITTEN,
        )
    return codes, scales


def unpack_groups(codes: Tensor, scales: Tensor, out: Tensor, bits: int) -> None:
    """:func:`fps_kernels.ops.reference.unpack_groups`; ``out`` is contiguous."""
    with torch.cuda.device_of(out):
        _unpack_groups[(triton.cdiv(scales.shape[0], BLOCK_G),)](
            codes,
            scales.view(torch.int32),
            out.view(torch.int16) if out.dtype == torch.bfloat16 else out,
            out.numel(),
            codes.numel(),
            LARGEST=torch.finfo(out.dtype).max,
            BITS=bits,
            BLOCK_G=BLOCK_G,
            num_warps=4,
            **AS_WRITTEN,
        )


@triton.jit
def _mixed(h):
    """A permutation of uint32 numbers, as the reference has it."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _places(position, size_1, size_2, size_3, stride_0, stride_1, stride_2, stride_3):
    """Where numbers are, by their positions among all of four dimensions."""
    i_3 = position % size_3
    position = position // size_3
    i_2 = position % size_2
    position = position // size_2
    i_1 = position % size_1
    return position // size_1 * stride_0 + i_1 * stride_1 + i_2 * stride_2 + i_3 * stride_3


@triton.jit(do_not_specialize=["key"])
def _pack_groups(
    x_ptr,
    codes_ptr,
    scales_ptr,
    n,
    code_bytes,
    key,
    size_1,
    size_2,
    size_3,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """``reference.pack_groups``. Must move: the numbers once, and their codes and scales."""
    MOST: tl.constexpr = 2**BITS - 1
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    position = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK_G, GROUP]
    there = position < n
    if LAYOUT == DENSE:
        places = position
    elif LAYOUT == ALIGNED:  # a thread can have 16 bytes of a group at once if it knows that they are there
        first = _places(group * GROUP, size_1, size_2, size_3, stride_0, stride_1, stride_2, stride_3)
        places = tl.multiple_of(first, 16)[:, None] + tl.arange(0, GROUP)[None, :]
    else:
        places = _places(position, size_1, size_2, size_3, stride_0, stride_1, stride_2, stride_3)
    x = to_float32(tl.load(x_ptr + places, mask=there, other=0.0))
    low = tl.min(tl.where(there, x, float("inf")), axis=1) + 0.0  # of two zeros the positive one
    high = tl.max(tl.where(there, x, float("-inf")), axis=1)
    low_bits = low.to(tl.int32, bitcast=True)
    minimum_bits = (low_bits + ((low_bits >> 31) & 0xFFFF)) & UPPER_HALF
    spread = high - minimum_bits.to(tl.float32, bitcast=True)
    least = tl.maximum(spread * (1.0 / MOST), SMALLEST_STEP)
    step_bits = (least.to(tl.int32, bitcast=True) + 0xFFFF) & UPPER_HALF
    # Of NaN the order of comparisons would decide, hence bits.
    finite = tl.max(magnitude_bits(x), axis=1) < INFINITY_BITS
    fits = finite & (magnitude_bits(spread) < INFINITY_BITS)
    minimum_bits = tl.where(fits, minimum_bits, NAN_BITS)
    step_bits = tl.where(fits, step_bits, 0)
    tl.store(scales_ptr + group, ((minimum_bits >> 16) & 0xFFFF) | step_bits, mask=group * GROUP < n)
    step = tl.where(fits, step_bits.to(tl.float32, bitcast=True), 1.0)
    inverse = tl.div_rn(tl.full([BLOCK_G], 1.0, tl.float32), step)
    scaled = (x - minimum_bits.to(tl.float32, bitcast=True)[:, None]) * inverse[:, None]
    if STOCHASTIC:
        h = _mixed(_mixed(position.to(tl.uint32)) + key.to(tl.uint32, bitcast=True))
        scaled += (h >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    else:
        scaled += 0.5
    scaled = tl.where(fits[:, None] & there, scaled, 0.0)
    codes = tl.minimum(scaled.to(tl.int32), MOST)
    if BITS == 8:
        # Stored as a row: of a tile in the same shape a thread would store 16 codes, and have to read 16 numbers for that.
        place = tl.program_id(0).to(tl.int64) * (BLOCK_G * GROUP) + tl.arange(0, BLOCK_G * GROUP)
        tl.store(codes_ptr + place, tl.reshape(codes.to(tl.uint8), [BLOCK_G * GROUP]), mask=place < code_bytes)
    else:
        first, second = tl.split(tl.reshape(codes, [BLOCK_G, 16, 2]))
        pair = group[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(codes_ptr + pair, (first | (second << 4)).to(tl.uint8), mask=pair < code_bytes)


@triton.jit
def _unpack_groups(
    codes_ptr, scales_ptr, out_ptr, n, code_bytes, LARGEST: tl.constexpr, BITS: tl.constexpr, BLOCK_G: tl.constexpr
):
    """``reference.unpack_groups``. Must move: codes and scales once, and what they become. Of bfloat16 ``out`` has bits."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    position = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK_G, GROUP]
    if BITS == 8:
        codes = tl.load(codes_ptr + position, mask=position < n, other=0).to(tl.int32)
    else:
        pair = group[:, None] * 16 + tl.arange(0, 16)[None, :]
        both = tl.load(codes_ptr + pair, mask=pair < code_bytes, other=0).to(tl.int32)
        codes = tl.reshape(tl.join(both & 15, both >> 4), [BLOCK_G, GROUP])
    scale = tl.load(scales_ptr + group, mask=group * GROUP < n, other=0)
    minimum = (scale << 16).to(tl.float32, bitcast=True)
    step = (scale & UPPER_HALF).to(tl.float32, bitcast=True)
    value = minimum[:, None] + codes.to(tl.float32) * step[:, None]
    value = tl.where(value > LARGEST, LARGEST, value)  # NaN is neither, and stays
    value = tl.where(value < -LARGEST, -LARGEST, value)
    if out_ptr.dtype.element_ty == tl.int16:
        tl.store(out_ptr + position, bfloat16_bits(value), mask=position < n)
    else:
        tl.store(out_ptr + position, value.to(out_ptr.dtype.element_ty), mask=position < n)
