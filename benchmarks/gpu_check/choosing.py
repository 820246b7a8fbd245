"""Choosing: over a bare forward pass, whole and in micro-batches, and against the gradient-based baseline."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.gpu_check.models import classifier
from benchmarks.gpu_check.rows import Row, attempt
from benchmarks.shared.device_timing import Bench
from benchmarks.shared.measuring import ratio


def choosing(bench: Bench, quick: bool) -> Iterator[Row]:
    """Choices over a bare forward pass at batch 64, and whether the device's choice is that of the CPU."""
    for dtype in (torch.bfloat16, torch.float32):
        label = {"dtype": str(dtype).removeprefix("torch.")}
        model, x, _ = classifier("vit_base_patch16_224", bench.device, 64, quick, dtype)
        model.eval()

        select = partial(fps.select, model, [x], progress=False)
        ways: dict[str, Callable[[], object]] = {
            "calibrate": partial(fps.calibrate, model, [x], progress=False),
            "PerNeuron(1)": select,
            "PerNeuron(1), micro-batches of 8": partial(select, micro_batch=8),
            "PerNeuron(8)": partial(select, budget=fps.PerNeuron(8)),
            "Global(0.01)": partial(select, budget=fps.Global(0.01)),
        }
        for name, way in ways.items():
            yield attempt({**label, "what": name}, partial(_beside_forward, bench, model, x, way))
        yield attempt({**label, "what": "the CPU's choice"}, partial(_same_choice, model, x))


def _beside_forward(bench: Bench, model: nn.Module, x: Tensor, way: Callable[[], object]) -> Row:
    """In turns with a bare forward pass."""

    @torch.no_grad()
    def forward() -> None:
        model(x)

    times = Bench(bench.device, max(2, bench.rounds // 4), 1).milliseconds({"forward": forward, "it": way})
    took = {"ms": median(times["it"]), "over forward": ratio(times, "it", "forward")}
    return {**took, "peak MiB": bench.peak_bytes(way, [model, x]) / 2**20}


def _same_choice(model: nn.Module, x: Tensor) -> Row:
    stats = fps.calibrate(model, [x], progress=False)
    here = fps.select(model, stats=stats, budget=fps.Global(0.01)).to("cpu")
    on_cpu = copy.deepcopy(stats)
    for weight in on_cpu.weights.values():
        weight.norm = weight.norm.cpu()
    there = fps.select(copy.deepcopy(model).cpu(), stats=on_cpu, budget=fps.Global(0.01))
    if (overlap := here.overlap(there)) != 1:
        raise AssertionError(f"the choices of device and CPU differ, overlap {overlap}")
    return {"note": "is the same"}


def gps_over_fps(bench: Bench, quick: bool) -> Iterator[Row]:
    """Time and peak memory of both ways of choosing, whole batch and in micro-batches, in float32."""
    model, x, y = classifier("vit_base_patch16_224", bench.device, 64, quick)
    model.eval()
    ways: dict[str, Callable[[], object]] = {
        "FPS": partial(fps.select, model, [x], progress=False),
        "FPS, micro-batches of 2": partial(fps.select, model, [x], micro_batch=2, progress=False),
        "GPS, cross-entropy": partial(fps.gps_select, model, [(x, y)], loss="cross_entropy", progress=False),
    }
    few = Bench(bench.device, max(2, bench.rounds // 4), 1)
    first: Row = {}
    for name, way in ways.items():

        def measured(way: Callable[[], object] = way) -> Row:
            return {"ms": few.of(way), "peak MiB": bench.peak_bytes(way, [model, x, y]) / 2**20}

        row = attempt({"way": name}, measured)
        if "failed" not in row:
            first = first or row
            row |= {"time over FPS": row["ms"] / first["ms"], "memory over FPS": row["peak MiB"] / first["peak MiB"]}
        yield row
