"""``pack_groups`` and ``unpack_groups``: one read, one write, 32 numbers a row of a tile.

A program serves 64 groups, a thread 16 numbers: of dense tensors it reads 16 bytes at a time. Where the numbers are no
multiple of 16 their end may be anywhere, and neighbouring threads have neighbouring numbers. Minimum and step of a group
are the halves of one 32-bit number, so that both are one store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.packing import MOST_DIMENSIONS, empty_packed
from fps_kernels.ops.triton.floats import bfloat16_bits, magnitude_bits, to_float32
from fps_kernels.ops.triton.target import AS_WRITTEN
from fps_kernels.ops.triton.updates import one_by_one

GROUP = tl.constexpr(32)
BLOCK_G = 64  # groups a program
INT32_END = 2**31  # where positions become int64
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
    codes, scales = empty_packed(x, bits)
    missing = MOST_DIMENSIONS - x.dim()
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
            signed,
            *shape[1:],
            *strides,
            LAYOUT=layout,
            FAR=n + BLOCK_G * 32 > INT32_END,
            BY_16=n % 16 == 0,
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
            LARGEST=torch.finfo(out.dtype).max,
            BY_16=out.numel() % 16 == 0,
            BITS=bits,
            BLOCK_G=BLOCK_G,
            num_warps=4,
            **AS_WRITTEN,
        )


@triton.jit
def _mixed(h):
    """The finalizer of MurmurHash3, of uint32 numbers, as the reference has it."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _places(position, size_1, size_2, size_3, stride_0, stride_1, stride_2, stride_3):
    """Where numbers are, by their positions among all of four dimensions. Divided is in the type of the positions, since a
    division of 64 bits is a hundred instructions; what is multiplied may lie further apart."""
    i_3 = (position % size_3).to(tl.int64)
    position = position // size_3
    i_2 = (position % size_2).to(tl.int64)
    position = position // size_2
    i_1 = (position % size_1).to(tl.int64)
    return (position // size_1).to(tl.int64) * stride_0 + i_1 * stride_1 + i_2 * stride_2 + i_3 * stride_3


@triton.jit
def _neighbours(COUNT: tl.constexpr, BY_16: tl.constexpr):
    """``0 .. COUNT - 1``, several of them in a thread only if a mask lets it have them at once."""
    return tl.arange(0, COUNT) if BY_16 else one_by_one(COUNT)


@triton.jit
def _left(n, start, BY_16: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a program's numbers there are, as int32, so that masks take no comparisons of 64 bits."""
    left = tl.minimum(n - start, BLOCK).to(tl.int32)
    return tl.multiple_of(left, 16) if BY_16 else left


@triton.jit
def _bytes(left, BY_16: tl.constexpr):
    """How many bytes so many codes of 4 bits are."""
    pairs = (left + 1) >> 1
    return tl.multiple_of(pairs, 8) if BY_16 else pairs


@triton.jit(do_not_specialize=["key"])
def _pack_groups(
    x_ptr,
    codes_ptr,
    scales_ptr,
    n,
    key,
    size_1,
    size_2,
    size_3,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    LAYOUT: tl.constexpr,
    FAR: tl.constexpr,
    BY_16: tl.constexpr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """``reference.pack_groups``. Must move: the numbers once, and their codes and scales."""
    MOST: tl.constexpr = 2**BITS - 1
    BLOCK: tl.constexpr = BLOCK_G * GROUP
    start = tl.program_id(0).to(tl.int64) * BLOCK  # position of the program's first number; the others are counted from it
    left = _left(n, start, BY_16, BLOCK)
    group = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    number = group[:, None] * GROUP + _neighbours(GROUP, BY_16)[None, :]  # [BLOCK_G, GROUP]
    there = number < left
    base = start if FAR else start.to(tl.int32)
    if LAYOUT == DENSE:
        pointers = x_ptr + start + number
    elif LAYOUT == ALIGNED:  # a thread can have 16 bytes of a group at once if it knows that they are there
        first = _places(base + group * GROUP, size_1, size_2, size_3, stride_0, stride_1, stride_2, stride_3)
        pointers = x_ptr + tl.multiple_of(first, 16)[:, None] + tl.arange(0, GROUP)[None, :]
    else:
        pointers = x_ptr + _places(base + number, size_1, size_2, size_3, stride_0, stride_1, stride_2, stride_3)
    x = to_float32(tl.load(pointers, mask=there, other=0.0))
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
    scale = ((minimum_bits >> 16) & 0xFFFF) | step_bits
    tl.store(scales_ptr + start // GROUP + group, scale, mask=group * GROUP < left)
    step = tl.where(fits, step_bits.to(tl.float32, bitcast=True), 1.0)
    inverse = tl.div_rn(tl.full([BLOCK_G], 1.0, tl.float32), step)
    scaled = (x - minimum_bits.to(tl.float32, bitcast=True)[:, None]) * inverse[:, None]
    if STOCHASTIC:
        h = _mixed(_mixed(start.to(tl.uint32) + number.to(tl.uint32)) + key.to(tl.uint32, bitcast=True))
        scaled += (h >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    else:
        scaled += 0.5
    scaled = tl.where(fits[:, None] & there, scaled, 0.0)
    codes = tl.minimum(scaled.to(tl.int32), MOST)
    if BITS == 8:
        # Stored in a row: for a tile of the same shape a thread would get 16 codes, and read 16 numbers, which are no
        # request.
        place = _neighbours(BLOCK, BY_16)
        tl.store(codes_ptr + start + place, tl.reshape(codes.to(tl.uint8), [BLOCK]), mask=place < left)
    else:
        first, second = tl.split(tl.reshape(codes, [BLOCK_G, 16, 2]))
        pair = group[:, None] * 16 + _neighbours(16, BY_16)[None, :]
        both = (first | (second << 4)).to(tl.uint8)
        tl.store(codes_ptr + start // 2 + pair, both, mask=pair < _bytes(left, BY_16))


@triton.jit
def _unpack_groups(
    codes_ptr,
    scales_ptr,
    out_ptr,
    n,
    LARGEST: tl.constexpr,
    BY_16: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """``reference.unpack_groups``. Must move: codes and scales once, and what they become. Of bfloat16 ``out`` has bits."""
    BLOCK: tl.constexpr = BLOCK_G * GROUP
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = _left(n, start, BY_16, BLOCK)
    group = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    number = group[:, None] * GROUP + _neighbours(GROUP, BY_16)[None, :]  # [BLOCK_G, GROUP]
    there = number < left
    if BITS == 8:
        codes = tl.load(codes_ptr + start + number, mask=there, other=0).to(tl.int32)
    else:
        pair = group[:, None] * 16 + _neighbours(16, BY_16)[None, :]
        both = tl.load(codes_ptr + start // 2 + pair, mask=pair < _bytes(left, BY_16), other=0).to(tl.int32)
        codes = tl.reshape(tl.join(both & 15, both >> 4), [BLOCK_G, GROUP])
    scale = tl.load(scales_ptr + start // GROUP + group, mask=group * GROUP < left, other=0)
    minimum = (scale << 16).to(tl.float32, bitcast=True)
    step = (scale & UPPER_HALF).to(tl.float32, bitcast=True)
    value = minimum[:, None] + codes.to(tl.float32) * step[:, None]
    value = tl.where(value > LARGEST, LARGEST, value)  # NaN is neither, and stays
    value = tl.where(value < -LARGEST, -LARGEST, value)
    if out_ptr.dtype.element_ty == tl.int16:
        tl.store(out_ptr + start + number, bfloat16_bits(value), mask=there)
    else:
        tl.store(out_ptr + start + number, value.to(out_ptr.dtype.element_ty), mask=there)
