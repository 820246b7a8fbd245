"""What the kernels make of the memory's bandwidth."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check.rows import Row, attempt
from benchmarks.shared.contestants import dense_gradient
from benchmarks.shared.device_timing import Bench
from benchmarks.shared.shapes import VIT_B, entries
from fps_kernels import ops

PATCHES = ([16, 16], [16, 16], [0] * 4, [1, 1], 1)


def bandwidth(bench: Bench, quick: bool) -> Iterator[Row]:
    """Bytes that each kernel must move over its time in a replayed graph, against a copy of the same run."""
    shrink = 64 if quick else 1
    source = torch.empty(2**29 // shrink, dtype=torch.int8, device=bench.device)
    goal = torch.empty_like(source)
    ms = bench.of(partial(goal.copy_, source))
    copied = 2 * source.nbytes / ms / 1e6
    yield {"kernel": "copy", "us": ms * 1e3, "MB": 2 * source.nbytes / 1e6, "GB/s": copied, "of copy": 1.0}
    del source, goal

    def measured(make: Callable[[], Callable[[], object]], nbytes: int) -> Row:
        ms = bench.alone(make, nbytes)
        return {"us": ms * 1e3, "MB": nbytes / 1e6, "GB/s": nbytes / ms / 1e6, "of copy": nbytes / ms / 1e6 / copied}

    for name, make, nbytes in _calls(bench.device, 16 if quick else 1):
        yield attempt({"kernel": name}, partial(measured, make, nbytes))
        if bench.on_gpu:
            torch.cuda.empty_cache()


def _calls(device: torch.device, shrink: int) -> Iterator[tuple[str, Callable[[], Callable[[], object]], int]]:
    """Name, what makes a call on tensors of its own, least bytes."""
    M, O = 12608 // shrink, 3072 // shrink

    def random(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def norm(dtype: torch.dtype) -> Callable[[], object]:
        acc = torch.zeros(768, dtype=torch.float64, device=device)
        return partial(ops.column_norm_, random(dtype, M, 768), acc, 1.0)

    def image_norm(dtype: torch.dtype) -> Callable[[], object]:
        acc = torch.zeros(1, 768, dtype=torch.float64, device=device)
        return partial(ops.column_norm_conv2d_, random(dtype, 64 // shrink, 3, 224, 224), acc, *PATCHES, 1.0)

    def topk(dtype: torch.dtype, k: int) -> Callable[[], object]:
        return partial(ops.score_topk, random(dtype, O, 768), torch.rand(768, device=device), k)

    def kth(dtype: torch.dtype) -> Callable[[], object]:
        weights = [random(dtype, rows // shrink, C) for rows, C in VIT_B]
        factors = [torch.rand(C, device=device) for _, C in VIT_B]
        return partial(ops.score_kth, weights, factors, sum(W.numel() for W in weights) // 100)

    def gradient(dtype: torch.dtype, k: int, C: int) -> Callable[[], object]:
        return partial(ops.sampled_grad, random(dtype, M, O), random(dtype, M, C), *entries(k, O, C, device))

    def dense(dtype: torch.dtype, C: int) -> Callable[[], object]:
        return partial(dense_gradient, random(dtype, M, O), random(dtype, M, C))

    def kept(dtype: torch.dtype) -> Callable[[], object]:
        columns = torch.randperm(768, device=device)[:160].sort().values.int()
        return partial(random(dtype, M, 768).index_select, 1, columns)

    def pack(dtype: torch.dtype) -> Callable[[], object]:
        return partial(ops.pack_groups, random(dtype, M, O), 8)

    def unpack(dtype: torch.dtype) -> Callable[[], object]:
        x = random(dtype, M, O)
        return partial(ops.unpack_groups, *ops.pack_groups(x, 8), x.shape, x.stride(), dtype, 8)

    for dtype in (torch.float32, torch.bfloat16):
        label, size = str(dtype).removeprefix("torch."), dtype.itemsize
        yield f"column_norm_ [{M}, 768] {label}", partial(norm, dtype), M * 768 * size
        for k in (1, 8, 64):
            yield f"score_topk [{O}, 768], k={k} {label}", partial(topk, dtype, k), O * 768 * size
        for k, C in ((1, 160), (4, 384), (16, 768)):
            yield f"sampled_grad fc1, k={k}, {C} columns {label}", partial(gradient, dtype, k, C), M * (O + C) * size
        yield f"gyᵀ @ x, dense fc1 {label}", partial(dense, dtype, 768), M * (O + 768) * size
        yield f"index_select 160 of 768 {label}", partial(kept, dtype), M * 320 * size
        nbytes = sum(rows // shrink * C for rows, C in VIT_B) * size
        yield f"score_kth, 1 % of ViT-B {label}", partial(kth, dtype), nbytes
        nbytes = M * O * (size + 1) + M * O // 8
        yield f"pack_groups [{M}, {O}], 8 bits {label}", partial(pack, dtype), nbytes
        yield f"unpack_groups [{M}, {O}], 8 bits {label}", partial(unpack, dtype), nbytes
        yield f"column_norm_conv2d_, patches {label}", partial(image_norm, dtype), 64 // shrink * 3 * 224 * 224 * size
