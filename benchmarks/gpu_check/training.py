"""A training step against full tuning, LoRA and a frozen model; each is alone on the device while it is measured."""

import copy
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.gpu_check.models import classifier
from benchmarks.gpu_check.rows import Row, attempt
from benchmarks.shared import methods
from benchmarks.shared.device_timing import Bench

METHODS = ("attach, k=1", "LoRA r=8", "frozen", "full", "attach, k=4", "attach, k=16")


def training(name: str, bench: Bench, quick: bool) -> Iterator[Row]:
    """A step in bfloat16 (autocast) at batch 64: time, what of it the host is busy for, and peak memory."""
    base, x, y = classifier(name, torch.device("cpu"), 64, quick)
    x, y, model = x.to(bench.device), y.to(bench.device), copy.deepcopy(base).to(bench.device)
    with torch.autocast(bench.device.type, torch.bfloat16):
        stats = fps.calibrate(model, [x], progress=False)
    chosen = {k: fps.select(model, stats=stats, budget=fps.PerNeuron(k)).to("cpu") for k in (1, 4, 16)}
    del model, stats
    makes: dict[str, Callable[[nn.Module], methods.Contestant]] = {
        "full": methods.full,
        "LoRA r=8": methods.lora,
        "frozen": methods.floor,
        **{f"attach, k={k}": partial(methods.attached, selection=selection) for k, selection in chosen.items()},
    }
    for method in METHODS:
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()
        yield attempt({"method": method}, partial(_measured, makes[method], base, bench, x, y))


def _measured(make: Callable[[nn.Module], methods.Contestant], base: nn.Module, bench: Bench, x: Tensor, y: Tensor) -> Row:
    one = make(copy.deepcopy(base).to(bench.device))
    step = partial(autocast_step, one.model, one.optimizer, x, y)
    step()
    peak = bench.peak_bytes(step, [one.model, x, y, *_states(one.optimizer)])
    ms = Bench(bench.device, max(2, bench.rounds // 2), bench.warmup).of(step)
    start = time.perf_counter()
    step()
    host = (time.perf_counter() - start) * 1e3
    bench.synchronize()
    return {"trained": one.trained, "ms": ms, "host ms": host, "peak MiB": peak / 2**20}


def autocast_step(
    model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, cache: bool = True
) -> Tensor:
    """A step whose loss nobody reads; ``cache`` as in ``torch.autocast``, off inside of a graph."""
    optimizer.zero_grad(set_to_none=cache)
    with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=cache):
        loss = F.cross_entropy(model(x).float(), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
