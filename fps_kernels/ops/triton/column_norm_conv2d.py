"""``column_norm_conv2d_``: the column norms of a convolution's unfolded input, without unfolding it.

Neighbouring windows share their sums. A column ``(c, u, v)`` adds up the pixels of channel ``c`` that tap ``(u, v)`` meets,
some lines and some pixels of each, the same in all images. So images are added up first, then for each vertical tap the
lines that it meets, then for each horizontal tap the pixels of that line: ``1 + kh / B + kh * kw / (B * H)`` additions a
pixel instead of ``kh * kw``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.records import Convolution
from fps_kernels.ops.triton.column_norm import accumulate, larger, ord_code
from fps_kernels.ops.triton.target import AS_WRITTEN

# Two for each SM of an H100, whose threads have eight loads of 16 bytes on their way: more images at a time are fewer sums.
TARGET_PROGRAMS = 264
BLOCK_PIXELS = 1024  # 16 bytes of bfloat16 for each thread
IMAGES = 8  # whose loads are on their way at the same time
MOST_IMAGES = 64  # that float32 may add
MOST_SUMS = 1 << 24  # float32 numbers of workspace; larger images are added up some lines at a time
UNROLLED = 8  # loads of the later stages on their way at the same time


def column_norm_conv2d_(x: Tensor, acc: Tensor, convolution: Convolution, ord: float) -> None:
    """:func:`fps_kernels.ops.reference.column_norm_conv2d_`. Column ``(c, u, v)`` of group ``g`` is one of channel
    ``g * C/groups + c``, so the groups drop out: ``acc`` is ``[C, kh, kw]``.

    Workspace: at most :data:`MOST_SUMS` float32 numbers, and ``C * kh * W`` float64 ones.
    """
    with torch.cuda.device_of(x):
        launch_column_norm_conv2d(x, acc, convolution, ord)


def launch_column_norm_conv2d(x: Tensor, acc: Tensor, convolution: Convolution, ord: float) -> None:
    B, C, H, W = x.shape
    channels_last = x.stride(1) == 1 and C > 1
    # Lines of pixels as they lie in memory: of each channel, or of all channels together.
    in_order = x.permute(0, 2, 3, 1) if channels_last else x
    outer, length = (1, W * C) if channels_last else (C, W)
    lines = torch.empty(outer, convolution.kernel_size[0], length, dtype=torch.float64, device=x.device)
    images = _images_per_split(B, outer * H * length)
    splits = triton.cdiv(B, images)
    at_a_time = max(1, min(H, MOST_SUMS // (splits * outer * length)))
    for top in range(0, H, at_a_time):
        part = in_order.narrow(1 if channels_last else 2, top, min(at_a_time, H - top))
        sums = launch_pixel_sums(part, images, ord)
        launch_line_sums(sums.view(splits, outer, -1, length), lines, top, convolution, H, ord)
    # Of `lines` [outer, kh, length], that of a channel, a vertical tap and a pixel of the line.
    strides = (1, length, C) if channels_last else (convolution.kernel_size[0] * W, W, 1)
    launch_window_sums(lines, acc, strides, convolution, W, convolution.output_size(x)[1], ord)


def _images_per_split(B: int, pixels: int) -> int:
    """How many images a program adds up: so few that the GPU is filled, but some loads for each thread."""
    wanted = -(-TARGET_PROGRAMS // -(-pixels // BLOCK_PIXELS))
    images = min(MOST_IMAGES, -(-B // wanted))
    return IMAGES * -(-images // IMAGES)


def launch_pixel_sums(x: Tensor, images_per_split: int, ord: float) -> Tensor:
    """Stage 1, float32 ``[splits, pixels]``, of ``x`` ``[B, ...]``, whose last three dimensions are in memory's order."""
    B = x.shape[0]
    pixels = x[0].numel()
    splits = triton.cdiv(B, images_per_split)
    sums = torch.empty(splits, pixels, dtype=torch.float32, device=x.device)
    _pixel_sums[(triton.cdiv(pixels, BLOCK_PIXELS), splits)](
        x,
        sums,
        B,
        pixels,
        *x.shape[2:],
        *x.stride(),
        images_per_split,
        ORD=ord_code(ord),
        DENSE=x[0].is_contiguous(),
        IMAGES=min(IMAGES, triton.next_power_of_2(B)),
        BLOCK=BLOCK_PIXELS,
        num_warps=4,
        **AS_WRITTEN,
    )
    return sums


def launch_line_sums(sums: Tensor, lines: Tensor, first: int, convolution: Convolution, H: int, ord: float) -> None:
    """Stage 2: of sums ``[splits, outer, some lines, length]``, from line ``first`` on, into ``[outer, kh, length]``."""
    splits, outer, some, length = sums.shape
    kh, out_h = convolution.kernel_size[0], _output_height(convolution, H)
    block = 128
    _line_sums[(triton.cdiv(outer * length, block), kh)](
        sums,
        lines,
        outer * length,
        length,
        splits,
        out_h,
        first,
        some,
        outer * some * length,
        convolution.stride[0],
        convolution.padding[0],
        convolution.dilation[0],
        ORD=ord_code(ord),
        ADD=first > 0,
        UNROLLED=UNROLLED,
        BLOCK=block,
        num_warps=1,
        **AS_WRITTEN,
    )


def _output_height(convolution: Convolution, H: int) -> int:
    top, bottom = convolution.padding[:2]
    return (H + top + bottom - convolution.dilation[0] * (convolution.kernel_size[0] - 1) - 1) // convolution.stride[0] + 1


def launch_window_sums(
    lines: Tensor, acc: Tensor, strides: tuple[int, int, int], convolution: Convolution, W: int, out_w: int, ord: float
) -> None:
    """Stage 3: into ``acc``, contiguous, as if ``[C, kh, kw]``."""
    kh, kw = convolution.kernel_size
    block = 64
    _window_sums[(triton.cdiv(acc.numel(), block),)](
        lines,
        acc,
        acc.numel(),
        kh,
        kw,
        W,
        out_w,
        *strides,
        convolution.stride[1],
        convolution.padding[2],
        convolution.dilation[1],
        ORD=ord_code(ord),
        UNROLLED=UNROLLED,
        BLOCK=block,
        num_warps=1,
        **AS_WRITTEN,
    )


@triton.jit
def _pixel_sums(
    x_ptr,
    sums_ptr,
    B,
    pixels,
    size_1,
    size_2,
    stride_b,
    stride_0,
    stride_1,
    stride_2,
    images_per_split,
    ORD: tl.constexpr,
    DENSE: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stage 1 of ``reference.column_norm_conv2d_``: for each pixel of each channel the sum of ``|x|^ord`` over some images.

    Must move: ``x`` once, and 4 bytes for each pixel and split out. In float32 a thread adds at most 64 numbers in turn: at
    most 65 roundings with the square, relative error below 4e-6; what follows is float64.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1).to(tl.int64)
    inside = n < pixels
    if DENSE:
        pointers = x_ptr + n
    else:
        line = n // size_2
        pointers = x_ptr + (line // size_1) * stride_0 + (line % size_1) * stride_1 + (n % size_2) * stride_2
    if ORD == 0:
        total = tl.zeros([BLOCK], tl.int32)
    else:
        total = tl.zeros([BLOCK], tl.float32)
    first = split * images_per_split
    last = tl.minimum(first + images_per_split, B)
    for image in range(first, last, IMAGES):
        for t in tl.static_range(IMAGES):
            # A block of the same number: newer interpreters make integers of a mask and-ed with a scalar.
            another = tl.full([BLOCK], image + t, tl.int64) < last
            x = tl.load(pointers + (image + t) * stride_b, mask=inside & another, other=0.0)
            total = accumulate(total, x, ORD)
    if ORD == 0:
        total = total.to(tl.float32, bitcast=True)
    tl.store(sums_ptr + split * pixels + n, total, mask=inside)


@triton.jit
def _line_sums(
    sums_ptr,
    lines_ptr,
    elements,
    length,
    splits,
    out_h,
    first,
    some,
    stride_s,
    step,
    top,
    spread,
    ORD: tl.constexpr,
    ADD: tl.constexpr,
    UNROLLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stage 2 of ``reference.column_norm_conv2d_``: for a vertical tap ``u`` the sum, over splits and output lines ``i``, of
    the pixels of line ``i * step - top + u * spread``, which counts as zeros outside the image.

    Must move: the sums of pixels once (other taps find them in the L2 cache), and 8 bytes for each pixel of a line out.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.program_id(1)
    outer = (n // length).to(tl.int64)
    inside = n < elements
    pointers = sums_ptr + outer * some * length + n % length
    if ORD == 0:
        total = tl.zeros([BLOCK], tl.int32)
    else:
        total = tl.zeros([BLOCK], tl.float64)
    for _ in range(splits):
        for start in range(0, out_h, UNROLLED):
            for t in tl.static_range(UNROLLED):
                h = (start + t) * step - top + u * spread - first
                there = (start + t < out_h) & (h >= 0) & (h < some)
                # A block of the same truth value: newer interpreters make integers of a mask and-ed with a scalar.
                mask = inside & (tl.zeros([BLOCK], tl.int32) < there.to(tl.int32))
                part = tl.load(pointers + h.to(tl.int64) * length, mask=mask, other=0.0)
                if ORD == 0:
                    total = tl.maximum(total, part.to(tl.int32, bitcast=True))
                else:
                    total += part.to(tl.float64)
        pointers += stride_s
    results = lines_ptr + (outer * tl.num_programs(1) + u) * length + n % length
    if ORD == 0:
        found = total.to(tl.float32, bitcast=True).to(tl.float64)
        if ADD:
            found = larger(tl.load(results, mask=inside, other=0.0), found)
    else:
        found = total
        if ADD:
            found += tl.load(results, mask=inside, other=0.0)
    tl.store(results, found, mask=inside)


@triton.jit
def _window_sums(
    lines_ptr,
    acc_ptr,
    columns,
    kh,
    kw,
    W,
    out_w,
    stride_c,
    stride_u,
    stride_w,
    step,
    left,
    spread,
    ORD: tl.constexpr,
    UNROLLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stage 3 of ``reference.column_norm_conv2d_``: ``acc[c, u, v]`` has added to it, or the maximum taken with, the pixels
    ``j * step - left + v * spread`` of line ``u`` of channel ``c``.

    Must move: the lines once (their pixels are shared by horizontal taps), 16 bytes for each column.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < columns
    first_w = n % kw * spread - left
    pointers = lines_ptr + (n // kw // kh).to(tl.int64) * stride_c + (n // kw % kh).to(tl.int64) * stride_u
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, out_w, UNROLLED):
        for t in tl.static_range(UNROLLED):
            w = first_w + (start + t) * step
            mask = inside & (w >= 0) & (w < tl.where(start + t < out_w, W, 0))
            part = tl.load(pointers + w.to(tl.int64) * stride_w, mask=mask, other=0.0)
            if ORD == 0:
                total = larger(total, part)
            else:
                total += part
    acc = tl.load(acc_ptr + n, mask=inside, other=0.0)
    if ORD == 0:
        result = larger(acc, total)
    else:
        result = acc + total
    tl.store(acc_ptr + n, result, mask=inside)
