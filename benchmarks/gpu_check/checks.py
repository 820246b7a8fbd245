"""What ``benchmarks.gpu_check`` measures; each check gives the rows of one table and raises where a result is wrong."""

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.shared import methods
from benchmarks.shared.contestants import dense_gradient
from benchmarks.shared.device_timing import Bench
from benchmarks.shared.measuring import ratio
from benchmarks.shared.shapes import VIT_B, entries
from fps_kernels import ops

Rows = list[dict[str, Any]]


def _vit(bench: Bench, quick: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, int]:
    """ViT-B/16, or a small one, and its image size."""
    name, size = ("vit_tiny_patch16_224", 64) if quick else ("vit_base_patch16_224", 224)
    return timm.create_model(name, img_size=size).to(bench.device, dtype).eval(), size


# ------------------------------------------------------------------------------------------------ kernels


def bandwidth(bench: Bench, quick: bool) -> Rows:
    """Bytes that each kernel must move over its time, against a copy that is measured in the same run."""
    shrink = 16 if quick else 1
    source = torch.randn(2**28 // shrink, dtype=torch.bfloat16, device=bench.device)
    copy_ms, moved = bench.of(partial(torch.empty_like(source).copy_, source)), 2 * source.nbytes
    copied = moved / copy_ms / 1e6
    rows: Rows = [{"kernel": "copy", "ms": copy_ms, "GB": moved / 1e9, "GB/s": copied, "of copy": 1.0}]
    for name, run, nbytes in _calls(bench.device, shrink):
        ms = bench.of(run)
        rows.append(
            {"kernel": name, "ms": ms, "GB": nbytes / 1e9, "GB/s": nbytes / ms / 1e6, "of copy": nbytes / ms / 1e6 / copied}
        )
    return rows


def _calls(device: torch.device, shrink: int) -> list[tuple[str, Callable[[], object], int]]:
    """Name, call, least bytes."""
    calls: list[tuple[str, Callable[[], object], int]] = []
    shapes = [(O // shrink, C) for O, C in VIT_B]
    M = 12608 // shrink
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        x, acc = torch.randn(M, 768, device=device).to(dtype), torch.zeros(768, dtype=torch.float64, device=device)
        calls.append((f"column_norm_ [{M}, 768] {label}", partial(ops.column_norm_, x, acc, 1.0), x.nbytes))
        weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        factors = [torch.rand(shape[1], device=device) for shape in shapes]
        nbytes = sum(W.nbytes for W in weights)
        for k in (1, 8, 64):

            def every(weights: list[Tensor] = weights, factors: list[Tensor] = factors, k: int = k) -> None:
                for W, a in zip(weights, factors, strict=True):
                    ops.score_topk(W, a, k)

            calls.append((f"score_topk, k={k}, all of ViT-B {label}", every, nbytes))
        total = sum(W.numel() for W in weights)
        calls.append((f"score_kth, 1 % of ViT-B {label}", partial(ops.score_kth, weights, factors, total // 100), nbytes))
    images = torch.randn(64 // min(shrink, 16), 3, 224, 224, device=device)
    acc = torch.zeros(1, 768, dtype=torch.float64, device=device)
    geometry = ([16, 16], [16, 16], [0] * 4, [1, 1], 1, 1.0)
    calls.append(("column_norm_conv2d_, patches", partial(ops.column_norm_conv2d_, images, acc, *geometry), images.nbytes))
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        gy, x = (torch.randn(M, width, device=device).to(dtype) for width in (3072 // shrink, 768))
        for k in (1, 4, 16):
            csr = entries(k, gy.shape[1], 768, device)
            nbytes = gy.nbytes + x.nbytes
            calls.append((f"sampled_grad, fc1, k={k} {label}", partial(ops.sampled_grad, gy, x, *csr), nbytes))
            calls.append((f"gyᵀ @ x, dense, fc1 {label}", partial(dense_gradient, gy, x), nbytes))
    return calls


# ------------------------------------------------------------------------------------------------ choosing


def choosing(bench: Bench, quick: bool) -> Rows:
    """Selections over a bare forward pass, and whether the GPU's choice is that of the CPU on the same statistics."""
    rows: Rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model, size = _vit(bench, quick, dtype)
        x = torch.randn(2 if quick else 64, 3, size, size, device=bench.device, dtype=dtype)

        @torch.no_grad()
        def forward(model: nn.Module = model, x: Tensor = x) -> None:
            model(x)

        contestants: dict[str, Callable[[], object]] = {"forward": forward}
        for budget in (fps.PerNeuron(1), fps.PerNeuron(8), fps.Global(0.01)):
            contestants[f"FPS, {budget}"] = partial(fps.select, model, [x], budget=budget, progress=False)
        times = bench.milliseconds(contestants)
        stats = fps.calibrate(model, [x], progress=False)
        here = fps.select(model, stats=stats, budget=fps.Global(0.01))
        moved = copy.deepcopy(model).cpu()
        there = fps.select(moved, stats=_on_cpu(stats), budget=fps.Global(0.01))
        if here.to("cpu").overlap(there) != 1:
            raise AssertionError(f"{dtype}: the choices of GPU and CPU differ, overlap {here.to('cpu').overlap(there)}")
        rows += [
            {"dtype": str(dtype), "what": name, "ms": median(times[name]), "over forward": ratio(times, name, "forward")}
            for name in contestants
        ]
    return rows


def _on_cpu(stats: fps.ActivationStats) -> fps.ActivationStats:
    moved = copy.deepcopy(stats)
    for weight in moved.weights.values():
        weight.norm = weight.norm.cpu()
    return moved


def gps_over_fps(bench: Bench, quick: bool) -> Rows:
    """Time and peak memory of both ways of choosing, whole batch and in micro-batches."""
    model, size = _vit(bench, quick)
    x = torch.randn(4 if quick else 64, 3, size, size, device=bench.device)
    y = torch.randint(1000, (len(x),), device=bench.device)
    ways: dict[str, Callable[[], object]] = {
        "FPS": partial(fps.select, model, [x], progress=False),
        "FPS, micro-batches of 2": partial(fps.select, model, [x], micro_batch=2, progress=False),
        "GPS, cross-entropy": partial(fps.gps_select, model, [(x, y)], loss="cross_entropy", progress=False),
    }
    few = Bench(bench.device, rounds=max(2, bench.rounds // 4), warmup=1)
    times = few.milliseconds(ways)
    peaks = {name: bench.peak_bytes(run, [model, x, y]) for name, run in ways.items()}
    return [
        {
            "way": name,
            "ms": median(times[name]),
            "time over FPS": ratio(times, name, "FPS"),
            "peak bytes": peaks[name],
            "memory over FPS": peaks[name] / peaks["FPS"],
        }
        for name in ways
    ]


# ------------------------------------------------------------------------------------------------ training


def training(bench: Bench, quick: bool) -> Rows:
    """A step of full tuning, LoRA and attach, alternating; peaks one by one."""
    model, size = _vit(bench, quick)
    model.train()
    x = torch.randn(2 if quick else 64, 3, size, size, device=bench.device)
    y = torch.randint(1000, (len(x),), device=bench.device)
    makes: dict[str, Callable[[nn.Module], methods.Contestant]] = {"full": methods.full, "LoRA r=8": methods.lora}
    for k in (1, 4, 16):
        selection = fps.select(model, [x], budget=fps.PerNeuron(k), progress=False)
        makes[f"attach, k={k}"] = partial(methods.attached, selection=selection)
    peaks = {}
    for name, make in makes.items():
        one = make(methods.fresh(model))
        one.step(x, y)
        peaks[name] = bench.peak_bytes(partial(one.step, x, y), [one.model, x, y, *_states(one.optimizer)])
        del one
    ready = {name: make(methods.fresh(model)) for name, make in makes.items()}
    few = Bench(bench.device, rounds=max(2, bench.rounds // 2), warmup=1 if quick else 2)
    times = few.milliseconds({name: partial(one.step, x, y) for name, one in ready.items()})
    return [
        {
            "method": name,
            "trained": ready[name].trained,
            "ms": median(times[name]),
            "time over full": ratio(times, name, "full"),
            "time over LoRA": ratio(times, name, "LoRA r=8"),
            "peak bytes": peaks[name],
        }
        for name in makes
    ]


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _trained_parameters(bench: Bench, quick: bool) -> tuple[list[nn.Parameter], fps.Selection]:
    shapes = [(O // (16 if quick else 1), C) for O, C in VIT_B]
    weights = [nn.Parameter(torch.randn(shape, device=bench.device)) for shape in shapes]
    for W in weights:
        W.grad = torch.randn_like(W)
    masks = {str(i): torch.rand_like(W) < 0.01 for i, W in enumerate(weights)}
    return weights, fps.Selection.from_masks(masks)


def optimizer(bench: Bench, quick: bool) -> Rows:
    """AdamW on 1 % of ViT-B's entries against ``torch.optim.AdamW(fused=True)`` on all of them."""
    weights, selection = _trained_parameters(bench, quick)
    group = {"params": weights, "selections": [selection[str(i)] for i in range(len(weights))]}
    masked = fps.MaskedAdamW([group], lr=1e-3)
    copies = [nn.Parameter(W.detach().clone()) for W in weights]
    for mine, W in zip(copies, weights, strict=True):
        mine.grad = W.grad
    dense = torch.optim.AdamW(copies, lr=1e-3, fused=True)
    times = bench.milliseconds({"MaskedAdamW, 1 %": masked.step, "torch.optim.AdamW(fused=True)": dense.step})
    name = "torch.optim.AdamW(fused=True)"
    return [{"optimizer": key, "ms": median(values), "over dense": ratio(times, key, name)} for key, values in times.items()]


def graph(bench: Bench, quick: bool) -> Rows:
    """Steps replayed from a CUDA graph end with the bits of steps that were launched one by one."""
    weights, selection = _trained_parameters(bench, quick)
    start = [W.detach().clone() for W in weights]

    def made(capturable: bool) -> tuple[list[nn.Parameter], fps.MaskedAdamW]:
        mine = [nn.Parameter(W.clone()) for W in start]
        for p, W in zip(mine, weights, strict=True):
            p.grad = W.grad
        group = {"params": mine, "selections": [selection[str(i)] for i in range(len(mine))]}
        lr = torch.tensor(1e-3, dtype=torch.float64, device=bench.device) if capturable else 1e-3
        return mine, fps.MaskedAdamW([group], lr=lr, capturable=capturable)

    one_by_one, plain = made(capturable=False)
    captured, capturable = made(capturable=True)
    for _ in range(5):
        plain.step()
    if bench.device.type != "cuda":  # the same optimizer without a graph to capture it in
        for _ in range(5):
            capturable.step()
        replay: Callable[[], object] = capturable.step
    else:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled and state is made outside the graph
                capturable.step()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):  # recorded, not run
            capturable.step()
        for _ in range(3):
            recorded.replay()
        torch.cuda.synchronize()
        replay = recorded.replay
    for i, (a, b) in enumerate(zip(one_by_one, captured, strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(
                f"weight {i}: the captured steps end elsewhere, by up to {float((a - b).detach().abs().max())}"
            )
    return [{"what": "replayed step", "ms": bench.of(replay)}, {"what": "launched step", "ms": bench.of(plain.step)}]
