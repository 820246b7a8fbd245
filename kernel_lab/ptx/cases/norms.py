"""``column_norm_`` and ``column_norm_conv2d_``."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fps_kernels.ops.records import Convolution
from kernel_lab.ptx.cases.case import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    INFINITY,
    SUM_BOUND,
    Arguments,
    Case,
    matrix,
    randn,
    size,
)

ORDS = (1.0, 2.0, INFINITY)


def cases() -> Iterator[Case]:
    yield from _of_matrices()
    yield from _of_images()


def _least(arguments: Arguments) -> int:
    x, acc = arguments[:2]
    return size(x) + 2 * size(acc)


def _elements(arguments: Arguments) -> int:
    x: Tensor = arguments[0]
    return x.numel()


def _bound(ord: float) -> float:
    return 0.0 if ord == INFINITY else SUM_BOUND


def _of_matrices() -> Iterator[Case]:
    def build(rows: int, columns: int, dtype: torch.dtype, layout: str, ord: float) -> Arguments:
        return matrix(rows, columns, dtype, layout), torch.rand(columns, dtype=FP64), ord

    def with_nan(dtype: torch.dtype) -> Arguments:
        x = randn(70, 40, dtype=dtype)
        x[3, 4], x[50, 6], x[1, 2] = float("nan"), INFINITY, -INFINITY
        return x, torch.rand(40, dtype=FP64), INFINITY

    case = partial(Case, "column_norm_", least=_least, elements=_elements)
    shapes = (
        (1, 1, "rows"),
        (5, 7, "rows"),
        (33, 300, "rows"),
        (257, 512, "rows"),
        (300, 77, "transposed"),
        (130, 129, "strided"),
        (200, 256, "padded"),
        (100, 64, "offset"),
        (90, 40, "repeated"),
    )
    for number, dtype in enumerate(DTYPES):
        for place, (rows, columns, layout) in enumerate(shapes):
            for which, ord in enumerate(ORDS):
                name = f"[{rows}, {columns}] {layout} ord {ord:g}"
                made = partial(build, rows, columns, dtype, layout, ord)
                lane = (place + number) % 3 == which and not (layout == "rows" and rows < 100 and number)
                yield case(name, dtype, made, tolerance=_bound(ord), lane=lane)
        for programs in (1, 3):
            forced = {"column_norm.TARGET_PROGRAMS": programs}
            made = partial(build, 1000, 300, dtype, "rows", 1.0)
            yield case(f"[1000, 300] with {programs} programs", dtype, made, tolerance=SUM_BOUND, forced=forced)
        yield case("[70, 40] with NaN and infinity, ord inf", dtype, partial(with_nan, dtype), lane=dtype == FP32)
        made = partial(build, 17 * 197, 768, dtype, "rows", 1.0)
        yield case("[3349, 768] ord 1", dtype, made, tolerance=SUM_BOUND, large=True)
    made = partial(build, 64 * 197, 768, BF16, "rows", 1.0)
    yield case("ViT-B/16 qkv, batch 64: [12608, 768] ord 1", BF16, made, tolerance=SUM_BOUND, large=True)


def _square(kernel: int, stride: int = 1, padding: int = 0, groups: int = 1) -> Convolution:
    return Convolution((kernel, kernel), (stride, stride), (padding,) * 4, (1, 1), groups)


UNEVEN = Convolution((3, 5), (1, 2), (1, 0, 2, 2), (2, 1), 3)


def _of_images() -> Iterator[Case]:
    def build(
        shape: tuple[int, ...], convolution: Convolution, channels_last: bool, dtype: torch.dtype, ord: float
    ) -> Arguments:
        x = randn(*shape, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        kh, kw = convolution.kernel_size
        acc = torch.rand(convolution.groups, shape[1] // convolution.groups * kh * kw, dtype=FP64)
        return x, acc, convolution, ord

    case = partial(Case, "column_norm_conv2d_", least=_least, elements=_elements)
    shapes = (
        ((1, 1, 1, 1), _square(1), False),
        ((3, 3, 9, 11), UNEVEN, False),
        ((3, 4, 9, 11), _square(3, padding=1, groups=2), True),
        ((2, 3, 32, 32), _square(16, stride=16), False),
        ((5, 8, 14, 14), _square(7, padding=3, groups=8), False),
        ((2, 70, 6, 6), _square(3, stride=2, padding=1), True),
        ((2, 33, 7, 7), _square(1), False),
    )
    for number, dtype in enumerate(DTYPES):
        for place, (shape, convolution, last) in enumerate(shapes):
            for which, ord in enumerate(ORDS):
                kh, kw = convolution.kernel_size
                name = f"{list(shape)} {kh}x{kw}{' channels-last' if last else ''} ord {ord:g}"
                made = partial(build, shape, convolution, last, dtype, ord)
                lane = place > 0 and (place + number) % 3 == which and (number + place) % 2 == 0
                yield case(name, dtype, made, tolerance=_bound(ord), lane=lane)
        forced = {"column_norm_conv2d.TARGET_PROGRAMS": 7}
        made = partial(build, (5, 3, 40, 21), UNEVEN, False, dtype, 1.0)
        yield case("[5, 3, 40, 21] with 7 programs", dtype, made, tolerance=SUM_BOUND, forced=forced, lane=dtype == FP16)
    networks = {
        "ViT patches [4, 3, 224, 224]": ((4, 3, 224, 224), _square(16, stride=16), False),
        "ResNet 3x3 [4, 64, 28, 28]": ((4, 64, 28, 28), _square(3, padding=1), False),
        "ResNet 3x3 channels-last [4, 64, 28, 28]": ((4, 64, 28, 28), _square(3, padding=1), True),
        "ConvNeXt 7x7 [8, 96, 14, 14]": ((8, 96, 14, 14), _square(7, padding=3, groups=96), False),
    }
    for name, (shape, convolution, last) in networks.items():
        made = partial(build, shape, convolution, last, BF16, 1.0)
        yield case(name, BF16, made, tolerance=SUM_BOUND, large=True)
