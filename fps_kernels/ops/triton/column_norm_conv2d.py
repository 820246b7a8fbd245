"""``column_norm_conv2d_``: the column norms of a convolution's unfolded input, read through strided windows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.records import Convolution
from fps_kernels.ops.triton.column_norm import TARGET_PROGRAMS, accumulate, launch_add_partials, ord_code

# Images whose windows one float32 tile adds up. Four would have more loads in flight per thread, but twice the registers
# (128, and a spill for some shapes) and so half the threads.
IMAGES = 2
TILE = 1024  # elements of a tile: eight per thread and image


def column_norm_conv2d_(
    x: Tensor,
    acc: Tensor,
    convolution: Convolution,
    ord: float,
) -> None:
    """:func:`fps_kernels.ops.reference.column_norm_conv2d_`. Column ``(c, u, v)`` of group ``g`` is one of channel
    ``g * C/groups + c``, so the groups drop out: ``acc`` is ``[C, kh, kw]``."""
    with torch.cuda.device_of(x):
        partials = launch_partial_conv_norms(x, convolution, ord)
        launch_add_partials(partials, acc, ord)


def launch_partial_conv_norms(x: Tensor, convolution: Convolution, ord: float) -> Tensor:
    """Stage 1. The workspace it returns, float64 ``[splits, C * kh * kw]``, has at most 528 rows, and fewer the more
    columns there are: at most ``8 * kh * kw * (528 * block_c + C)`` bytes, ``block_c`` at most 64."""
    B, C, H, W = x.shape
    (kh, kw), stride, (top, _, left, _), dilation, _ = convolution
    out_h, out_w = convolution.output_size(x)
    block_p, block_c, block_v = _tile(x, out_h * out_w, kw)
    # Rows of taps whose windows overlap go through one program, which finds them in its cache again. Windows that do
    # not overlap (a patch embedding) share nothing: one program per row of taps, or three channels would fill few SMs.
    taps_per_program = kh if stride[0] < dilation[0] * (kh - 1) + 1 else 1
    tap_blocks = triton.cdiv(kh, taps_per_program)
    columns = triton.cdiv(C, block_c) * tap_blocks
    wanted = triton.cdiv(TARGET_PROGRAMS, columns)
    position_blocks = triton.cdiv(out_h * out_w, block_p)
    blocks_per_split = triton.cdiv(position_blocks, wanted)
    position_splits = triton.cdiv(position_blocks, blocks_per_split)
    images_per_split = IMAGES * triton.cdiv(triton.cdiv(B, IMAGES), max(1, wanted // position_splits))
    image_splits = triton.cdiv(B, images_per_split)
    partials = torch.empty(position_splits * image_splits, C * kh * kw, dtype=torch.float64, device=x.device)
    _partial_conv_norms[(columns, position_splits, image_splits)](
        x,
        partials,
        B,
        C,
        H,
        W,
        *x.stride(),
        out_h * out_w,
        out_w,
        kh,
        kw,
        *stride,
        top,
        left,
        *dilation,
        taps_per_program,
        tap_blocks,
        blocks_per_split,
        images_per_split,
        ORD=ord_code(ord),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        BLOCK_V=block_v,
        IMAGES=IMAGES,
        num_warps=4,
    )
    return partials


def _tile(x: Tensor, positions: int, kw: int) -> tuple[int, int, int]:
    """Output positions, channels and horizontal taps of a tile: the widest side is the one contiguous in memory."""
    C = x.shape[1]
    if x.stride(1) == 1 and C > 1:  # channels-last
        block_c = min(64, triton.next_power_of_2(C))
        block_v = min(64 // block_c, triton.next_power_of_2(kw))
        return min(TILE // (block_c * block_v), triton.next_power_of_2(positions)), block_c, block_v
    block_v = min(16, triton.next_power_of_2(kw))
    block_p = min(TILE // block_v, 256, triton.next_power_of_2(positions))
    return block_p, min(TILE // (block_p * block_v), 64, triton.next_power_of_2(C)), block_v


@triton.jit
def _partial_conv_norms(
    x_ptr,
    partials_ptr,
    B,
    C,
    H,
    W,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    positions,
    out_w,
    kh,
    kw,
    step_h,
    step_w,
    top,
    left,
    spread_h,
    spread_w,
    taps_per_program,
    tap_blocks,
    blocks_per_split,
    images_per_split,
    ORD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Stage 1 of ``reference.column_norm_conv2d_``: for each channel and tap ``(u, v)`` the sum of ``|x|^ord`` over the
    pixels ``(i * step_h - top + u * spread_h, j * step_w - left + v * spread_w)``, pixels outside counting as zeros.

    Must move: ``x`` once (every window after the first hits the caches). In float32 a tile adds ``IMAGES`` numbers in turn,
    then at most eight per thread, then a tree: at most 19 roundings with the square, relative error below 1.2e-6.
    """
    program = tl.program_id(0)
    position_split = tl.program_id(1)
    image_split = tl.program_id(2)
    n = tl.arange(0, BLOCK_C * BLOCK_V)
    channels = (program // tap_blocks) * BLOCK_C + n % BLOCK_C  # [N], fastest: contiguous in channels-last
    first_u = (program % tap_blocks) * taps_per_program
    first_image = image_split.to(tl.int64) * images_per_split
    last_image = tl.minimum(first_image + images_per_split, B)
    first_block = position_split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(positions, BLOCK_P))
    split = position_split.to(tl.int64) * tl.num_programs(2) + image_split
    for u in range(first_u, tl.minimum(first_u + taps_per_program, kh)):
        for first_v in range(0, kw, BLOCK_V):
            v = first_v + n // BLOCK_C  # [N]
            if ORD == 0:
                total = tl.zeros([BLOCK_C * BLOCK_V], tl.int32)
            else:
                total = tl.zeros([BLOCK_C * BLOCK_V], tl.float64)
            for block in range(first_block, last_block):
                p = block * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
                h = (p // out_w) * step_h - top + u * spread_h  # [P]
                w = ((p % out_w) * step_w - left)[:, None] + (v * spread_w)[None, :]  # [P, N]
                inside = ((p < positions) & (h >= 0) & (h < H))[:, None] & (w >= 0) & (w < W)
                inside = inside & ((channels < C) & (v < kw))[None, :]
                offsets = (h.to(tl.int64) * stride_h)[:, None] + w.to(tl.int64) * stride_w
                offsets += (channels.to(tl.int64) * stride_c)[None, :]  # [P, N]
                for image in range(first_image, last_image, IMAGES):
                    if ORD == 0:
                        part = tl.zeros([BLOCK_P, BLOCK_C * BLOCK_V], tl.int32)
                    else:
                        part = tl.zeros([BLOCK_P, BLOCK_C * BLOCK_V], tl.float32)
                    for t in tl.static_range(IMAGES):
                        # A block of the same number: newer interpreters make integers of a mask and-ed with a scalar.
                        another = tl.full([1, BLOCK_C * BLOCK_V], image + t, tl.int64) < last_image
                        x = tl.load(
                            x_ptr + (image + t) * stride_b + offsets,
                            mask=inside & another,
                            other=0.0,
                        )  # [P, N]
                        part = accumulate(part, x, ORD)
                    if ORD == 0:
                        total = tl.maximum(total, tl.max(part, 0))
                    else:
                        total += tl.sum(part, 0).to(tl.float64)
            if ORD == 0:
                result = total.to(tl.float32, bitcast=True).to(tl.float64)
            else:
                result = total
            columns = (channels.to(tl.int64) * kh + u) * kw + v
            tl.store(
                partials_ptr + split * C * kh * kw + columns,
                result,
                mask=(channels < C) & (v < kw),
            )
