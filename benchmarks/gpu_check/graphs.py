"""Steps that are captured or compiled: the optimizer's alone, a whole one in a CUDA graph, and torch.compile."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.gpu_check.models import classifier
from benchmarks.gpu_check.rows import NEEDS_GPU, Row, attempt
from benchmarks.gpu_check.training import autocast_step
from benchmarks.shared.device_timing import Bench
from benchmarks.shared.measuring import ratio
from benchmarks.shared.shapes import VIT_B


def _problem(bench: Bench, quick: bool) -> tuple[list[nn.Parameter], fps.Selection]:
    shapes = [(O // (16 if quick else 1), C) for O, C in VIT_B]
    weights = [nn.Parameter(torch.randn(shape, device=bench.device)) for shape in shapes]
    for W in weights:
        W.grad = torch.randn_like(W)
    return weights, fps.Selection.from_masks({str(i): torch.rand(W.shape) < 0.01 for i, W in enumerate(weights)})


def _copies(weights: list[nn.Parameter]) -> list[nn.Parameter]:
    made = [nn.Parameter(W.detach().clone()) for W in weights]
    for mine, W in zip(made, weights, strict=True):
        mine.grad = W.grad
    return made


def optimizer(bench: Bench, quick: bool) -> Iterator[Row]:
    """AdamW on 1 % of ViT-B's entries, launched and replayed from a graph, against torch's fused AdamW on all of them."""
    weights, selection = _problem(bench, quick)

    def masked(params: list[nn.Parameter], capturable: bool) -> fps.MaskedAdamW:
        lr = torch.tensor(1e-3, dtype=torch.float64, device=bench.device) if capturable else 1e-3
        group = {"params": params, "selections": [selection[str(i)] for i in range(len(params))]}
        return fps.MaskedAdamW([group], lr=lr, capturable=capturable)

    def times() -> Iterator[Row]:
        dense = torch.optim.AdamW(_copies(weights), lr=1e-3, fused=True)
        found = bench.milliseconds({"ours": masked(_copies(weights), False).step, "dense": dense.step})
        yield {"what": "MaskedAdamW, 1 %", "ms": median(found["ours"]), "over dense": ratio(found, "ours", "dense")}
        yield {"what": "torch.optim.AdamW(fused=True)", "ms": median(found["dense"]), "over dense": 1.0}

    yield from times()

    def replayed() -> Row:
        one_by_one, captured = _copies(weights), _copies(weights)
        plain, capturable = masked(one_by_one, False), masked(captured, True)
        for _ in range(5):
            plain.step()
        replay = _captured(capturable.step, warmup=2)
        for _ in range(3):
            replay()
        bench.synchronize()
        for i, (a, b) in enumerate(zip(one_by_one, captured, strict=True)):
            if not torch.equal(a, b):
                worst = float((a - b).detach().abs().max())
                raise AssertionError(f"weight {i}: the captured steps end elsewhere, by up to {worst}")
        return {"ms": bench.of(replay)}

    label = {"what": "MaskedAdamW, replayed"}
    yield attempt(label, replayed) if bench.on_gpu else {**label, "note": NEEDS_GPU}


def _captured(step: Callable[[], object], warmup: int) -> Callable[[], None]:
    """The replay of a step that was captured in a graph, after some that were not: kernels are compiled and state made."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):  # recorded, not run
        step()
    return recorded.replay


def whole_step(bench: Bench, quick: bool) -> Iterator[Row]:
    """Forward pass, backward pass and step of ViT-B in bfloat16 at batch 64, launched and replayed from one graph."""
    model, x, y = classifier("vit_base_patch16_224", bench.device, 64, quick)
    tuner = fps.attach(model, fps.select(model, [x], progress=False))
    lr = torch.tensor(1e-3, device=bench.device)
    made = fps.MaskedAdamW(tuner, lr=lr, capturable=True)
    losses: list[Tensor] = []

    def step() -> None:
        losses.append(autocast_step(model, made, x, y, cache=False))

    few = Bench(bench.device, max(2, bench.rounds // 4), bench.warmup)
    yield attempt({"what": "launched"}, lambda: {"ms": few.of(step)})

    def replayed() -> Row:
        replay = _captured(step, warmup=4)
        replay()
        bench.synchronize()
        before = float(losses[-1])
        ms = few.of(replay)
        if not (after := float(losses[-1])) < before:
            raise AssertionError(f"the loss of the replayed steps does not fall: {before:.4g}, then {after:.4g}")
        return {"ms": ms, "loss before": before, "loss after": after}

    yield attempt({"what": "replayed"}, replayed) if bench.on_gpu else {"what": "replayed", "note": NEEDS_GPU}


def compiled(bench: Bench, quick: bool) -> Iterator[Row]:
    """A step of ViT-B in bfloat16 at batch 64, as it is and under ``torch.compile``; a CPU has no compiler to wait for."""
    model, x, y = classifier("vit_base_patch16_224", bench.device, 64, quick)
    optimizer = fps.MaskedAdamW(fps.attach(model, fps.select(model, [x], progress=False)), lr=1e-3)
    few = Bench(bench.device, max(2, bench.rounds // 4), bench.warmup)
    yield attempt({"what": "eager"}, lambda: {"ms": few.of(partial(autocast_step, model, optimizer, x, y))})

    def measured() -> Row:
        made = torch.compile(model, backend="inductor" if bench.on_gpu else "aot_eager")
        step = partial(autocast_step, made, optimizer, x, y)
        start = time.perf_counter()
        step()
        bench.synchronize()
        return {"first step s": time.perf_counter() - start, "ms": few.of(step)}

    yield attempt({"what": "compiled"}, measured)
