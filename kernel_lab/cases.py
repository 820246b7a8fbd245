"""Calls on the shapes of real networks, without their memory: what the compile tests and the report go through."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fps_kernels.ops import triton as backend
from fps_kernels.ops.packing import along_memory
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Agreement, Convolution
from fps_kernels.ops.triton.gradients import sampled_grad_with_bias
from fps_kernels.ops.triton.target import assume
from kernel_lab import compilation

BF16, FP16, FP32, INT32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
SECTOR = 32  # bytes: the least that memory moves for a scattered entry


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: what and how large.
        op: the function of the Triton backend.
        arguments: for the op, on the ``meta`` device.
        bytes: the least that the op as designed must move to and from memory, what its launches leave for one another
            included; 0 where that is of no interest.
        wide: whether the kernels that read matrices must do so by 16 bytes: everything is contiguous and aligned.
    """

    name: str
    op: Callable[..., object]
    arguments: tuple[Any, ...]
    bytes: int
    wide: bool


def tensor(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _square(k: int, stride: int, padding: int, groups: int = 1) -> Convolution:
    """The same in both directions, without dilation."""
    return Convolution((k, k), (stride, stride), (padding, padding, padding, padding), (1, 1), groups)


def vit_weights(blocks: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """The four matrices of every block of a ViT with MLP ratio 4."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [tensor(*shape, dtype=dtype) for _ in range(blocks) for shape in shapes]


def cases() -> Iterator[Case]:
    """Every kernel of the backend, in the specialisations that matter."""
    for case in _cases():
        yield replace(case, bytes=case.bytes + 2 * workspace(case)) if case.bytes else case


def workspace(case: Case) -> int:
    """Bytes that the op allocates and does not return: its launches write them once and read them once."""
    allocations = _Allocations()
    with allocations, compilation.recording("sm_90", []), assume("sm_90"):
        result = case.op(*case.arguments)
    return allocations.bytes - _size(*(t for t in tree_leaves(result) if isinstance(t, Tensor)))


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in ("aten::empty.memory_format", "aten::zeros", "aten::new_empty"):
            self.bytes += _size(result)
        return result


def _cases() -> Iterator[Case]:
    yield from _column_norms()
    yield from _convolutions()
    yield from _topk()
    yield from _thresholds()
    yield from _gradients()
    yield from _conv_gradients()
    yield from _deltas()
    yield from _updates()
    yield from _packing()
    yield from _extremes()


def _column_norms() -> Iterator[Case]:
    def case(name: str, x: Tensor, ord: float, wide: bool = True) -> Case:
        acc = tensor(x.shape[1], dtype=torch.float64)
        return Case(f"column_norm {name}", backend.column_norm_, (x, acc, ord), _size(x) + 2 * _size(acc), wide)

    for dtype in (BF16, FP16, FP32):
        for ord in (1.0,) if dtype == FP16 else (1.0, 2.0, float("inf")):
            yield case(f"ViT-B/16 qkv, batch 64, {_short(dtype)}, ord {ord:g}", tensor(64 * 197, 768, dtype=dtype), ord)
    yield case("ViT-H/14 fc1, batch 64, bf16, ord 1", tensor(64 * 257, 1280, dtype=BF16), 1.0)
    yield case("ViT-H/14 fc2, batch 64, bf16, ord 1", tensor(64 * 257, 5120, dtype=BF16), 1.0)
    yield case("transposed, bf16, ord 1", tensor(768, 12608, dtype=BF16).t(), 1.0, wide=False)
    yield case("odd strides, bf16, ord 1", tensor(12609, 771, dtype=BF16)[:, ::3], 1.0, wide=False)
    yield case("one row repeated, fp32, ord inf", tensor(1, 768).expand(12608, 768), float("inf"), wide=False)


def _convolutions() -> Iterator[Case]:
    def case(name: str, x: Tensor, k: int, stride: int, padding: int, ord: float = 1.0, wide: bool = False) -> Case:
        acc = tensor(1, x.shape[1] * k * k, dtype=torch.float64)
        arguments = (x, acc, _square(k, stride, padding), ord)
        return Case(f"column_norm_conv2d {name}", backend.column_norm_conv2d_, arguments, _size(x) + 2 * _size(acc), wide)

    for dtype in (BF16, FP32):
        image = tensor(64, 3, 224, 224, dtype=dtype)
        yield case(f"ViT-B/16 patches, batch 64, {_short(dtype)}", image, 16, 16, 0, wide=True)
    yield case(
        "ViT-B/16 patches, batch 64, fp16, ord inf", tensor(64, 3, 224, 224, dtype=FP16), 16, 16, 0, float("inf"), True
    )
    image = tensor(64, 3, 224, 224, dtype=BF16)
    yield case("ViT-H/14 patches, batch 64, bf16", image, 14, 14, 0)
    channels_last = tensor(64, 64, 56, 56, dtype=BF16).to(memory_format=torch.channels_last)
    yield case("ResNet 3x3, 64 channels, batch 64, bf16", tensor(64, 64, 56, 56, dtype=BF16), 3, 1, 1)
    yield case("ResNet 3x3, 64 channels, batch 64, bf16, channels-last", channels_last, 3, 1, 1, wide=True)
    yield case("ResNet stem 7x7, batch 64, fp32, ord 2", tensor(64, 3, 224, 224), 7, 2, 3, 2.0)
    yield case("ConvNeXt-T 7x7, 384 channels, batch 64, bf16", tensor(64, 384, 14, 14, dtype=BF16), 7, 1, 3)
    yield case("ResNet 1x1, 256 channels, batch 64, bf16", tensor(64, 256, 56, 56, dtype=BF16), 1, 1, 0)


def _topk() -> Iterator[Case]:
    def case(name: str, W: Tensor, k: int, wide: bool = True) -> Case:
        a = tensor(1, W.shape[1])
        moved = _size(W, a) + W.shape[0] * k * 4
        return Case(f"score_topk {name}, k={k}", backend.score_topk, (W, a, k), moved, wide)

    for dtype in (BF16, FP16, FP32):
        for k in (1,) if dtype == FP16 else (1, 8, 64):
            yield case(f"ViT-B/16 fc1 [3072, 768] {_short(dtype)}", tensor(3072, 768, dtype=dtype), k)
    for k in (1, 8, 64):
        yield case("ViT-B/16 fc2 [768, 3072] bf16", tensor(768, 3072, dtype=BF16), k)
        yield case("ViT-H/14 fc2 [1280, 5120] fp32", tensor(1280, 5120), k)
        yield case("unaligned [3001, 771] bf16", tensor(3001, 771, dtype=BF16), k, wide=False)
    yield case("GPT-2 Conv1D [3072, 768] transposed fp32", tensor(768, 3072).t(), 1, wide=False)
    yield case("GPT-2 Conv1D [3072, 768] transposed fp32", tensor(768, 3072).t(), 64, wide=False)
    yield case("unaligned [771, 3001] fp32", tensor(771, 3001), 64, wide=False)
    yield case("3x3 of 1024 channels [1024, 9216] bf16", tensor(1024, 9216, dtype=BF16), 64)
    yield case("3x3 of 1024 channels [1024, 9216] fp32", tensor(1024, 9216), 64)
    yield case("unaligned [1021, 9001] bf16", tensor(1021, 9001, dtype=BF16), 64, wide=False)


def _thresholds() -> Iterator[Case]:
    def kth(name: str, weights: list[Tensor], wide: bool = True) -> Case:
        factors = [tensor(1, W.shape[1]) for W in weights]
        k = sum(W.numel() for W in weights) // 100
        return Case(f"score_kth {name}", backend.score_kth, (weights, factors, k), 3 * _size(*weights, *factors), wide)

    def counts(name: str, weights: list[Tensor], wide: bool = True) -> Case:
        factors = [tensor(1, W.shape[1]) for W in weights]
        arguments = (weights, factors, tensor(len(weights)))
        return Case(f"score_counts {name}", backend.score_counts, arguments, _size(*weights, *factors), wide)

    def select(name: str, W: Tensor, wide: bool = True) -> Case:
        nnz = W.numel() // 100
        arguments = (W, tensor(1, W.shape[1]), tensor(), nnz)
        return Case(f"score_select {name}", backend.score_select, arguments, 2 * _size(W) + 4 * nnz, wide)

    for dtype in (BF16, FP16, FP32):
        yield kth(f"ViT-B/16, all blocks, {_short(dtype)}, 1 %", vit_weights(12, 768, dtype))
        yield counts(f"ViT-B/16, all blocks, {_short(dtype)}", vit_weights(12, 768, dtype))
        yield select(f"ViT-B/16 fc1 [3072, 768] {_short(dtype)}, 1 %", tensor(3072, 768, dtype=dtype))
    yield kth("ViT-H/14, all blocks, bf16, 1 %", vit_weights(32, 1280, BF16))
    yield kth("unaligned, bf16", [tensor(3001, 771, dtype=BF16)], wide=False)
    yield counts("unaligned, bf16", [tensor(3001, 771, dtype=BF16)], wide=False)
    yield kth("unaligned, fp32", [tensor(3001, 771)], wide=False)
    yield kth("depthwise 7x7, fp32", [tensor(768, 49)], wide=False)
    yield select("transposed [3072, 768] fp32", tensor(768, 3072).t(), wide=False)
    yield select("depthwise 7x7 fp32", tensor(768, 49), wide=False)


def _csr(O: int, nnz: int) -> tuple[Tensor, Tensor]:
    return tensor(O + 1, dtype=torch.int32), tensor(nnz, dtype=torch.int32)


def _gradients() -> Iterator[Case]:
    def case(name: str, gy: Tensor, x: Tensor, nnz: int, wide: bool = False) -> Case:
        arguments = (gy, x, *_csr(gy.shape[1], nnz))
        return Case(f"sampled_grad {name}", backend.sampled_grad, arguments, _size(gy, x) + 8 * nnz, wide)

    # Distinct columns that k entries of every output leave of a layer's input. On a pretrained ViT-S they were at k=1 a
    # fifth or so (of fc2 3-9 %) and at k=4 of fc2 7-25 %; for the others at k=4 a half is assumed.
    vit_b = (("qkv", 2304, 160, 384), ("proj", 768, 160, 384), ("fc1", 3072, 160, 384), ("fc2", 768, 192, 512))
    for dtype in (BF16, FP32):
        for layer, O, *distinct in vit_b:
            for k, C in zip((1, 4), distinct, strict=True):
                gy, x = tensor(64 * 197, O, dtype=dtype), tensor(64 * 197, C, dtype=dtype)
                yield case(f"ViT-B/16 {layer}, batch 64, {_short(dtype)}, k={k}, {C} columns", gy, x, O * k, True)
    for dtype in (BF16, FP16, FP32):
        gy, x = tensor(12608, 3072, dtype=dtype), tensor(12608, 768, dtype=dtype)
        yield case(f"ViT-B/16 fc1, batch 64, {_short(dtype)}, 5 %, 768 columns", gy, x, 117_964, True)
    gy, x = tensor(12608, 768, dtype=BF16), tensor(12608, 3072, dtype=BF16)
    yield case("ViT-B/16 fc2, batch 64, bf16, k=1, 3072 columns", gy, x, 768)
    yield case(
        "ViT-B/16 head, batch 64, bf16, k=1, 48 columns", tensor(64, 1000, dtype=BF16), tensor(64, 48, dtype=BF16), 1000
    )
    for dtype in (BF16, FP32):
        gy, x = tensor(12608, 3072, dtype=dtype), tensor(12608, 137, dtype=dtype)
        yield case(f"ViT-B/16 fc1, batch 64, {_short(dtype)}, k=8, 137 columns", gy, x, 24_576)
    for dtype in (BF16, FP16, FP32):
        for other in (BF16, FP16, FP32):
            for nnz in (768, 76_800):
                odd = tensor(12609, 2311, dtype=dtype)[:, ::3], tensor(137, 12609, dtype=other).t()
                yield case(f"odd strides, {_short(dtype)} and {_short(other)}, {nnz} entries", *odd, nnz)
    for dtype in (BF16, FP16, FP32):
        gy, x = tensor(12608, 3072, dtype=dtype), tensor(12608, 384, dtype=dtype)
        for k in (1, 16):
            arguments = (gy, x, *_csr(3072, 3072 * k))
            name = f"sampled_grad with bias ViT-B/16 fc1, batch 64, {_short(dtype)}, k={k}, 384 columns"
            yield Case(name, sampled_grad_with_bias, arguments, _size(gy, x) + 4 * 3072 * (2 * k + 1), wide=k == 16)
    for C in (768, 50):  # both widths of a tile, 32 entries per output in each look
        gy, x = tensor(256 * 197, 1280, dtype=BF16), tensor(256 * 197, C, dtype=BF16)
        yield case(f"batch 256, bf16, 32 entries in each of 1280 rows, {C} columns", gy, x, 40_960)


def _deltas() -> Iterator[Case]:
    for dtype in (BF16, FP16, FP32):
        for k in (1, 4):
            y, x = tensor(64 * 197, 3072, dtype=dtype), tensor(64 * 197, 768, dtype=dtype)
            arguments = (y, x, *_csr(3072, 3072 * k), tensor(3072 * k), None)
            name = f"sparse_delta_matmul ViT-B/16 fc1, batch 64, {_short(dtype)}, k={k}"
            yield Case(name, backend.sparse_delta_matmul_, arguments, 2 * _size(y) + 12608 * 384 * x.element_size(), False)
        turned = (x, y, *_csr(768, 3072), tensor(3072), tensor(3072, dtype=torch.int32))
        name = f"sparse_delta_matmul ViT-B/16 fc1's input, batch 64, {_short(dtype)}, k=1"
        yield Case(name, backend.sparse_delta_matmul_, turned, 2 * _size(x) + _size(y), False)
    odd = tensor(12609, 2311)[:, ::3], tensor(137, 12609, dtype=BF16).t()
    yield Case(
        "sparse_delta_matmul odd strides", backend.sparse_delta_matmul_, (*odd, *_csr(771, 771), tensor(771), None), 0, False
    )


def _conv_gradients() -> Iterator[Case]:
    def case(name: str, x: Tensor, O: int, k: int, stride: int, padding: int, per_output: int, groups: int = 1) -> Case:
        size = [(side + 2 * padding - k) // stride + 1 for side in x.shape[2:]]
        gy = tensor(x.shape[0], O, *size, dtype=x.dtype)
        if x.stride(1) == 1:
            gy = gy.to(memory_format=torch.channels_last)
        csr = _csr(O, O * per_output)
        arguments = (gy, x, *csr, _square(k, stride, padding, groups))
        return Case(f"sampled_grad_conv2d {name}", backend.sampled_grad_conv2d, arguments, _size(gy, x) + 8 * O, False)

    for dtype in (BF16, FP16, FP32):
        image = tensor(64, 3, 224, 224, dtype=dtype)
        yield case(f"ViT-B/16 patches, batch 64, {_short(dtype)}, k=1", image, 768, 16, 16, 0, 1)
        image = tensor(64, 64, 56, 56, dtype=dtype)
        last = image.to(memory_format=torch.channels_last)
        yield case(f"ResNet 3x3, 64 channels, batch 64, {_short(dtype)}, k=4", image, 64, 3, 1, 1, 4)
        yield case(f"ResNet 3x3, 64 channels, batch 64, {_short(dtype)}, channels-last, k=4", last, 64, 3, 1, 1, 4)
    image = tensor(64, 384, 14, 14, dtype=BF16)
    yield case("ConvNeXt-T 7x7, 384 channels, batch 64, bf16, k=1", image, 384, 7, 1, 3, 1, groups=384)
    yield case("ResNet stem 7x7, batch 64, fp32, k=1", tensor(64, 3, 224, 224), 64, 7, 2, 3, 1)
    yield case("ResNet 1x1, 256 channels, batch 64, bf16, k=4", tensor(64, 256, 7, 7, dtype=BF16), 64, 1, 1, 0, 4)


def _updates() -> Iterator[Case]:
    def adamw(name: str, weights: list[Tensor], compact: bool, scaler: bool, zero: bool = False) -> Case:
        counts = [W.numel() // 100 for W in weights]
        dtype = weights[0].dtype
        tensors = AdamWTensors(
            weights,
            [tensor(n, dtype=dtype) for n in counts] if compact else [torch.empty_like(W) for W in weights],
            [tensor(W.shape[0] + 1, dtype=torch.int32) for W in weights],
            [tensor(n, dtype=torch.int32) for n in counts],
            [tensor(0 if dtype == FP32 else n) for n in counts],
            [tensor(n) for n in counts],
            [tensor(n) for n in counts],
            [tensor() for _ in counts],
            [tensor(0) for _ in counts],
        )
        options = AdamWOptions(
            tensor(len(weights), dtype=torch.float64),
            [0.01] * len(weights),
            0.9,
            0.999,
            1e-8,
            False,
            tensor() if scaler else None,
            tensor() if scaler else None,
            zero,
        )
        weight = 2 * SECTOR if dtype == FP32 else SECTOR + 2 * 4  # read and written, or written, beside its master
        grad = (weights[0].element_size() if compact else SECTOR) * (2 if zero else 1)
        moved = sum(counts) * (4 + 4 * 4 + weight + grad)
        return Case(f"masked_adamw {name}", backend.masked_adamw_, (tensors, options), moved, False)

    yield adamw("ViT-B/16, 1 %, fp32, dense gradients", vit_weights(12, 768, FP32), compact=False, scaler=False)
    yield adamw("ViT-B/16, 1 %, fp32, compact gradients", vit_weights(12, 768, FP32), compact=True, scaler=False)
    yield adamw("ViT-H/14, 1 %, bf16, compact gradients, scaler", vit_weights(32, 1280, BF16), compact=True, scaler=True)
    yield adamw("ViT-H/14, 1 %, bf16, zeroed gradients, scaler", vit_weights(32, 1280, BF16), False, True, zero=True)
    for name, weights in (("ViT-B/16", vit_weights(12, 768, FP32)), ("ViT-H/14", vit_weights(32, 1280, BF16))):
        csr = [_csr(W.shape[0], W.numel() // 100) for W in weights]
        lists = [
            [offsets for offsets, _ in csr],
            *([tensor(c.numel(), dtype=t) for _, c in csr] for t in (INT32, FP32, FP32)),
        ]
        moved = sum(c.numel() for _, c in csr) * (3 * 4 + SECTOR)
        agreement = (Agreement(weights, *lists),)
        yield Case(f"agree_values {name}, 1 %, {_short(weights[0].dtype)}", backend.agree_values_, agreement, moved, False)
    for dtype in (BF16, FP16, FP32):
        W, nnz = tensor(3072, 768, dtype=dtype), 23592
        arguments = (W, tensor(3073, dtype=torch.int32), tensor(nnz, dtype=torch.int32), tensor(nnz))
        moved = nnz * (4 + 4 + SECTOR)
        yield Case(f"scatter_values ViT-B/16 fc1, 1 %, {_short(dtype)}", backend.scatter_values_, arguments, moved, False)


def _packing() -> Iterator[Case]:
    def both(name: str, x: Tensor, bits: int, key: int | None, wide: bool) -> Iterator[Case]:
        numbers = x.numel()
        codes, scales = tensor(-(-numbers * bits // 8), dtype=torch.uint8), tensor(-(-numbers // 32), 2, dtype=BF16)
        moved, label = _size(x, codes, scales), f"{name}, {_short(x.dtype)}, {bits} bits"
        how = ", stochastic" if key else ""
        yield Case(f"pack_groups {label}{how}", backend.pack_groups, (along_memory(x), bits, key), moved, wide)
        if key is None:
            arguments = (codes, scales, tensor(numbers, dtype=x.dtype), bits)
            yield Case(f"unpack_groups {label}", backend.unpack_groups, arguments, moved, wide)

    for dtype in (BF16, FP16, FP32):
        for bits in (8, 4):
            yield from both("ViT-B/16 GELU, batch 64", tensor(64 * 197, 3072, dtype=dtype), bits, None, True)
    yield from both("ViT-B/16 GELU, batch 64", tensor(64 * 197, 3072, dtype=BF16), 8, 7, True)
    query = tensor(64, 197, 3, 12, 64, dtype=BF16).permute(2, 0, 3, 1, 4)[0]
    yield from both("ViT-B/16 queries, batch 64", query, 8, None, False)
    for size in (1, 33, 2**31 + 16):
        yield from both(f"{size} numbers", tensor(size, dtype=FP32), 8, None, False)
    yield from both("far", torch.empty_strided((48, 768), (2**31 + 16, 1), device="meta"), 4, 7, False)
    many = torch.empty_strided((2**27, 17), (40, 2), device="meta")
    yield from both("many, strided", many, 8, None, False)


def _extremes() -> Iterator[Case]:
    """Sizes of 1, which Triton compiles in, and sizes and strides beyond 32 bits, which change the types of arguments."""
    one, int32 = tensor(1, 1), torch.int32
    far = torch.empty_strided((48, 768), (2**31 + 16, 1), device="meta")  # a slice of something huge
    pointwise = _square(1, 1, 0)
    calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = [
        (backend.column_norm_, (one, tensor(1, dtype=torch.float64), 1.0)),
        (backend.column_norm_, (tensor(2**31 + 16, 1), tensor(1, dtype=torch.float64), float("inf"))),
        (backend.column_norm_, (far, tensor(768, dtype=torch.float64), 2.0)),
        (backend.column_norm_conv2d_, (tensor(1, 1, 1, 1), tensor(1, 1, dtype=torch.float64), pointwise, 1.0)),
        (backend.column_norm_conv2d_, (tensor(2, 3, 40_000, 40_000), tensor(1, 3, dtype=torch.float64), pointwise, 1.0)),
    ]
    calls += [
        (backend.sampled_grad, (one, one, *_csr(1, 1))),
        (backend.sampled_grad, (tensor(1, 1, dtype=BF16), tensor(1, 1, dtype=BF16), *_csr(1, 1))),
        (backend.sampled_grad, (far, far, *_csr(768, 768))),
        (backend.sampled_grad, (far, far, *_csr(768, 76_800))),
        (backend.sampled_grad, (tensor(2**31 + 16, 1), tensor(2**31 + 16, 900), *_csr(1, 1))),
        (backend.sampled_grad_conv2d, (tensor(1, 1, 1, 1), tensor(1, 1, 1, 1), *_csr(1, 1), pointwise)),
        (
            backend.sampled_grad_conv2d,
            (tensor(2, 3, 40_000, 40_000), tensor(2, 3, 40_000, 40_000), *_csr(3, 3), pointwise),
        ),
    ]
    for W in (one, far):
        nnz = W.shape[0]
        csr = tensor(nnz + 1, dtype=int32), tensor(nnz, dtype=int32)
        calls += [(backend.score_topk, (W, tensor(1, W.shape[1]), k)) for k in {1, min(2, W.shape[1]), W.shape[1]}]
        calls += [
            (backend.score_kth, ([W], [tensor(1, W.shape[1])], 1)),
            (backend.score_counts, ([W], [tensor(1, W.shape[1])], tensor(1))),
            (backend.score_select, (W, tensor(1, W.shape[1]), tensor(), nnz)),
            (backend.scatter_values_, (W, *csr, tensor(nnz))),
        ]
    by_passes = torch.empty_strided((1, 9000), (2**31 + 16, 1), device="meta")
    calls.append((backend.score_topk, (by_passes, tensor(1, 9000), 20)))
    for number, (op, arguments) in enumerate(calls):
        yield Case(f"{op.__name__.rstrip('_')} extreme {number}", op, arguments, 0, False)


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
