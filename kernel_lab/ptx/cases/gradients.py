"""``sampled_grad``, with the bias's and of whole layers, and ``sampled_grad_conv2d``."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fps_kernels.ops import reference
from fps_kernels.ops import triton as backend
from fps_kernels.ops.recomputing import recomputed
from fps_kernels.ops.records import GELU, GELU_TANH, LAYER_NORM, Convolution, Csr, Recomputed
from kernel_lab.ptx.cases.case import BF16, DTYPES, FP16, FP32, SUM_BOUND, Arguments, Case, csr, matrix, randn, size

GATHER = {"gradients.prefer_product": lambda *arguments: False}
PRODUCT = {"gradients.prefer_product": lambda *arguments: True}
WAYS = {"gather": GATHER, "product": PRODUCT}
FEW_ROWS = {"short": 64, "tf32x3": 64, "ieee": 64}


def cases() -> Iterator[Case]:
    yield from _of_matrices("sampled_grad")
    yield from _of_matrices("sampled_grad_with_bias")
    yield from _in_parts()
    yield from _of_layers()
    yield from _of_images()


def linear_gradients(
    gy: Tensor, x: Tensor, csr: Csr, wants_bias: bool, how: Recomputed | None
) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """A layer's, whose input is computed again where the layer does not keep it: before the call, on a GPU."""
    return lambda: backend.linear_gradients(gy, x if how is None else recomputed(x, how), csr, wants_bias, None)


def sampled_grad_with_bias(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """What the backend's function of this name should give."""
    return reference.sampled_grad(gy, x, row_offsets, columns), gy.double().sum(0).float()


def reference_linear_gradients(
    gy: Tensor, x: Tensor, csr: Csr, wants_bias: bool, how: Recomputed | None
) -> tuple[Tensor, Tensor | None]:
    """What :func:`linear_gradients` should give, from the same input; the bias's sum in float64, whatever the dtype."""
    grad, _ = reference.linear_gradients(gy, x if how is None else recomputed(x, how), csr, False, None)
    return grad, gy.double().flatten(0, -2).sum(0).float() if wants_bias else None


def _least(arguments: Arguments) -> int:
    gy, x, row_offsets, columns = arguments[:4]
    return size(gy, x, row_offsets) + 8 * int(columns.numel())


def _elements(arguments: Arguments) -> int:
    """Multiplications."""
    gy, columns = arguments[0], arguments[3]
    return int(gy.numel() // gy.shape[1] * columns.numel())


def _linear(
    rows: int, O: int, C: int, entries: int, dtype: torch.dtype, layout: str, x_dtype: torch.dtype, per_row: bool = False
) -> Arguments:
    return matrix(rows, O, dtype, layout), matrix(rows, C, x_dtype, layout), *csr(O, C, entries, per_row)


def _of_matrices(op: str) -> Iterator[Case]:
    case = partial(Case, op, least=_least, elements=_elements, tolerance=SUM_BOUND)
    shapes = (
        (1, 1, 1, 1, "rows"),
        (7, 5, 3, 6, "rows"),
        (70, 64, 48, 150, "rows"),
        (130, 130, 70, 400, "rows"),
        (100, 96, 200, 300, "padded"),
        (90, 50, 60, 200, "strided"),
        (65, 48, 80, 200, "transposed"),
        (50, 32, 64, 900, "offset"),
    )
    plain = op == "sampled_grad"
    for way, forced in WAYS.items():
        for number, dtype in enumerate(DTYPES):
            for place, (rows, O, C, entries, layout) in enumerate(shapes):
                name = f"{way} [{rows}, {O}] x [{rows}, {C}] {layout}, {entries} entries"
                made = partial(_linear, rows, O, C, entries, dtype, layout, dtype)
                lane = place > 0 and (place + number + (way == "gather")) % (3 if plain else 6) == 0
                yield case(name, dtype, made, forced=forced, lane=lane)
        made = partial(_linear, 40, 33, 20, 80, BF16, "rows", FP32)
        yield case(f"{way} [40, 33] bf16 x [40, 20] fp32", BF16, made, forced=forced, lane=plain == (way == "product"))


def _in_parts() -> Iterator[Case]:
    """Sums of parts of the rows go through memory."""
    case = partial(Case, "sampled_grad", least=_least, elements=_elements, tolerance=SUM_BOUND)
    few = {"gradients.PRODUCT_PROGRAMS": 2, "gradients.MOST_SPLITS": 2, "gradients.MOST_ROWS": FEW_ROWS}
    for dtype in (FP32, BF16):
        made = partial(_linear, 300, 64, 64, 300, dtype, "rows", dtype)
        name = "product [300, 64] in several launches"
        yield case(name, dtype, made, forced={**PRODUCT, **few}, lane=True)
        made = partial(_linear, 3000, 16, 16, 60, dtype, "rows", dtype)
        forced = {**GATHER, "gradients.GATHER_PROGRAMS": 2}
        yield case("gather [3000, 16], long parts", dtype, made, forced=forced, lane=dtype == BF16)
        made = partial(_linear, 788, 768, 160, 768, dtype, "rows", dtype, True)
        name = "gather fc [788, 768] x [788, 160], k=1"
        yield case(name, dtype, made, forced=GATHER, large=True)
        made = partial(_linear, 1576, 768, 384, 3072, dtype, "rows", dtype, True)
        name = "product fc [1576, 768] x [1576, 384], k=4"
        yield case(name, dtype, made, forced=PRODUCT, large=True)


def _of_layers() -> Iterator[Case]:
    def build(dtype: torch.dtype, bias: bool, how: str, transposed: bool = False) -> Arguments:
        gy, x = randn(3, 25, 48, dtype=dtype), randn(3, 25, 40, dtype=dtype)
        if transposed:
            gy = gy.mT.contiguous().mT
        again = None
        if how in ("gelu", "gelu tanh"):
            again = Recomputed(GELU if how == "gelu" else GELU_TANH)
        elif how == "layer norm":
            mean = x.float().mean(-1, keepdim=True)
            scale = (x.float().var(-1, keepdim=True, correction=0) + 1e-6).rsqrt()
            again = Recomputed(LAYER_NORM, mean, scale, randn(40), randn(40))
        return gy, x, Csr(*csr(48, 40, 250)), bias, again

    def least(arguments: Arguments) -> int:
        gy, x, selection, *_ = arguments
        return size(gy, x, selection.row_offsets) + 8 * int(selection.nnz)

    def elements(arguments: Arguments) -> int:
        return int(arguments[0].shape[:-1].numel() * arguments[2].nnz)

    case = partial(Case, "linear_gradients", least=least, elements=elements, tolerance=SUM_BOUND)
    for number, dtype in enumerate(DTYPES):
        for which, how in enumerate(("kept", "gelu", "gelu tanh", "layer norm")):
            made = partial(build, dtype, which % 2 == 0, how)
            name = f"[3, 25, 48] x [3, 25, 40] {how}{' with bias' if which % 2 == 0 else ''}"
            yield case(name, dtype, made, lane=which == number or which == 3)
        made = partial(build, dtype, True, "kept", True)
        yield case("[3, 25, 48] transposed, with bias", dtype, made, lane=dtype == FP16)


def _of_images() -> Iterator[Case]:
    def build(
        shape: tuple[int, ...], O: int, convolution: Convolution, entries: int, last: bool, dtype: torch.dtype
    ) -> Arguments:
        x = randn(*shape, dtype=dtype)
        gy = randn(shape[0], O, *convolution.output_size(x), dtype=dtype)
        if last:
            x, gy = x.to(memory_format=torch.channels_last), gy.to(memory_format=torch.channels_last)
        kh, kw = convolution.kernel_size
        per_row = entries % O == 0
        return gy, x, *csr(O, shape[1] // convolution.groups * kh * kw, entries, per_row), convolution

    def square(kernel: int, stride: int = 1, padding: int = 0, groups: int = 1) -> Convolution:
        return Convolution((kernel, kernel), (stride, stride), (padding,) * 4, (1, 1), groups)

    case = partial(Case, "sampled_grad_conv2d", least=_least, elements=_image_elements, tolerance=SUM_BOUND)
    shapes = (
        ((1, 1, 1, 1), 1, square(1), 1, False),
        ((3, 6, 9, 11), 9, Convolution((3, 5), (1, 2), (1, 0, 2, 2), (2, 1), 3), 60, False),
        ((3, 4, 9, 11), 6, square(3, padding=1, groups=2), 70, True),
        ((2, 3, 32, 32), 20, square(16, stride=16), 41, False),
        ((5, 8, 14, 14), 8, square(7, padding=3, groups=8), 20, False),
        ((1, 2, 5, 150), 3, Convolution((1, 3), (1, 1), (0, 0, 1, 1), (1, 1), 1), 10, False),
    )
    for number, dtype in enumerate(DTYPES):
        for place, (shape, O, convolution, entries, last) in enumerate(shapes):
            kh, kw = convolution.kernel_size
            name = f"{list(shape)} to {O}, {kh}x{kw}{' channels-last' if last else ''}, {entries} entries"
            made = partial(build, shape, O, convolution, entries, last, dtype)
            yield case(name, dtype, made, lane=place > 0 and (place + number) % 3 == 0)
            few = {"gradients_conv2d.GATHER_PROGRAMS": 1}
            yield case(f"{name}, few programs", dtype, made, forced=few, lane=place > 0 and (place + number) % 3 == 1)
    networks = {
        "ViT patches [4, 3, 224, 224], 96 outputs, k=1": ((4, 3, 224, 224), 96, square(16, stride=16), 96, False),
        "ResNet 3x3 [4, 64, 28, 28], k=4": ((4, 64, 28, 28), 64, square(3, padding=1), 256, False),
        "ResNet 3x3 channels-last [4, 64, 28, 28], k=4": ((4, 64, 28, 28), 64, square(3, padding=1), 256, True),
    }
    for name, arguments in networks.items():
        yield case(name, BF16, partial(build, *arguments, BF16), large=True)


def _image_elements(arguments: Arguments) -> int:
    gy, columns = arguments[0], arguments[3]
    return int(gy.shape[0] * gy.shape[2] * gy.shape[3] * columns.numel())
