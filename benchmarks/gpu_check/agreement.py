"""Each op once, against what it means: wrong numbers make all that is measured after them worthless."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fps_kernels as fps
from benchmarks.gpu_check.rows import Row, attempt
from benchmarks.shared.device_timing import Bench
from benchmarks.shared.shapes import entries
from fps_kernels import ops

WINDOWS = ([3, 3], [1, 1], [1] * 4, [1, 1], 1)


def agreement(bench: Bench, quick: bool) -> Iterator[Row]:
    """Every op once, against plain PyTorch on the same device: choices exactly, sums to 1e-5, steps to 1e-6."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, call, exact in _ops(bench.device, dtype):
            yield attempt({"op": name, "dtype": str(dtype).removeprefix("torch.")}, partial(_compared, bench, call, exact))


def _compared(bench: Bench, call: Callable[[], list[Tensor]], exact: bool) -> Row:
    start = time.perf_counter()
    torch.manual_seed(0)
    found = call()
    bench.synchronize()
    seconds = time.perf_counter() - start
    torch.manual_seed(0)
    with fps.use_backend("reference"):
        expected = call()
    error = 0.0
    for a, b in zip(found, expected, strict=True):
        if exact and not torch.equal(a, b):
            raise AssertionError(f"{int((a != b).sum())} of {a.numel()} numbers differ from the reference")
        size = float(b.double().norm())
        error = max(error, float((a.double() - b.double()).norm()) / size if size else float(a.double().norm()))
    if error > 1e-5:
        raise AssertionError(f"the relative error is {error:.2g}")
    return {"relative error": error, "first call s": seconds}


def _ops(device: torch.device, dtype: torch.dtype) -> list[tuple[str, Callable[[], list[Tensor]], bool]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def norm() -> list[Tensor]:
        acc = zeros(200, dtype=torch.float64)
        ops.column_norm_(random(1000, 200), acc, 1.0)
        return [acc]

    def image_norm() -> list[Tensor]:
        acc = zeros(1, 27, dtype=torch.float64)
        ops.column_norm_conv2d_(random(4, 3, 20, 20), acc, *WINDOWS, 2.0)
        return [acc]

    def topk() -> list[Tensor]:
        return [ops.score_topk(random(300, 200), random(200).float().abs(), 5)]

    def threshold() -> list[Tensor]:
        weights, factors = [random(300, 200), random(64, 32)], [random(200).float().abs(), random(32).float().abs()]
        kth, greater, equal = ops.score_kth(weights, factors, 1000)
        nnz = int(greater[0]) + min(1000 - int(greater.sum()), int(equal[0]))
        return [kth, greater, equal, *ops.score_select(weights[0], factors[0], kth, nnz)]

    def gradient(k: int) -> list[Tensor]:
        return [ops.sampled_grad(random(900, 128), random(900, 200), *entries(k, 128, 200, device))]

    def image_gradient() -> list[Tensor]:
        csr = entries(3, 8, 27, device)
        return [ops.sampled_grad_conv2d(random(4, 8, 20, 20), random(4, 3, 20, 20), *csr, *WINDOWS)]

    def scatter() -> list[Tensor]:
        W, csr = random(300, 200), entries(4, 300, 200, device)
        ops.scatter_values_(W, *csr, random(1200).float())
        return [W]

    def step() -> list[Tensor]:
        W, csr = random(300, 200), entries(4, 300, 200, device)
        rows = torch.arange(300, device=device).repeat_interleave(4)
        master = W[rows, csr[1].long()].float()
        state, count = [zeros(1200), zeros(1200)], zeros()
        lrs = torch.full((1,), 1e-3, dtype=torch.float64, device=device)
        numbers = [0.1], 0.9, 0.999, 1e-8, False, None, None, False
        grads = [random(1200).float()]
        for _ in range(3):
            ops.masked_adamw_([W], grads, [csr[0]], [csr[1]], [master], [state[0]], [state[1]], [count], lrs, *numbers)
        return [master, *state, count]

    def agree() -> list[Tensor]:
        W, csr = random(300, 200), entries(4, 300, 200, device)
        rows = torch.arange(300, device=device).repeat_interleave(4)
        agreed = W[rows, csr[1].long()].float()
        values = agreed.clone()
        values[:100] += 1
        W[rows[200:300], csr[1].long()[200:300]] = 3
        ops.agree_values_([W], [csr[0]], [csr[1]], [values], [agreed])
        return [W, values, agreed]

    def pack(x: Tensor, bits: int, seed: int | None) -> list[Tensor]:
        packed = ops.pack_groups(x, bits, seed)
        return [*packed, ops.unpack_groups(*packed, x.shape, x.stride(), dtype, bits)]

    def packs() -> list[Tensor]:
        strided, dense = random(300, 300)[:, :200], random(12_345)
        return [*pack(strided, 8, 5), *pack(dense, 8, None), *pack(dense, 4, 2**40), *pack(dense[:12_000], 4, None)]

    return [
        ("column_norm_", norm, False),
        ("column_norm_conv2d_", image_norm, False),
        ("score_topk", topk, True),
        ("score_kth, score_select", threshold, True),
        ("sampled_grad, k=1", partial(gradient, 1), False),
        ("sampled_grad, k=40", partial(gradient, 40), False),
        ("sampled_grad_conv2d", image_gradient, False),
        ("scatter_values_", scatter, True),
        ("masked_adamw_", step, False),
        ("agree_values_", agree, True),
        ("pack_groups, unpack_groups", packs, True),
    ]
