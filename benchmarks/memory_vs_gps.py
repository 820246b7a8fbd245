"""Peak memory of choosing: FPS against GPS, ``python -m benchmarks.memory_vs_gps [--quick]``.

Bytes of live tensors at batch 64, float32, weights included. ViT-B is really run both ways (with ``--quick`` a ViT-Ti at
batch 8 is), to hold the simulation against reality; the large models are simulated. The papers state at least 9× (FPS v1,
arXiv 2510.27359v1) and 18× (v2) less memory than gradient-based selection.

``--model NAME`` (of timm) or ``--model module:function`` (which makes a model; ``--input 3 224 224`` is the size of a
sample) simulates anyone's own, and writes no results.
"""

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch

import fps_kernels as fps
from benchmarks.shared.measuring import save, table
from fps_kernels.memory import format_bytes, measure, simulated
from fps_kernels.selection import Selection

MODELS = {
    "ViT-B/16": ("vit_base_patch16_224", 224),
    "ViT-L/16": ("vit_large_patch16_224", 224),
    "ViT-H/14": ("vit_huge_patch14_224", 224),
    "ViT-g/14": ("vit_giant_patch14_224", 224),
}
Program = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], Any]


def forward(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    with torch.no_grad():
        model.eval()(x)


METHODS: dict[str, Program] = {
    "forward": forward,
    "FPS": lambda model, x, y: fps.select(model, [x], progress=False),
    "FPS, micro-batches of 2": lambda model, x, y: fps.select(model, [x], micro_batch=2, progress=False),
    "FPS, micro-batches of 1": lambda model, x, y: fps.select(model, [x], micro_batch=1, progress=False),
    "GPS, cross-entropy": lambda model, x, y: fps.gps_select(model, [(x, y)], loss="cross_entropy", progress=False),
    "GPS, two views": lambda model, x, y: fps.gps_select(model, [(x, y)], views=fps.gps.random_views, progress=False),
    "GPS, cross-entropy, micro-batches of 1": lambda model, x, y: fps.gps_select(
        model, [(x, y)], loss="cross_entropy", micro_batch=1, progress=False
    ),
}


def simulate(name: str, size: int, batch: int, program: Program) -> int:
    """Peak bytes, without running anything."""
    with simulated() as build:
        model = build(lambda: timm.create_model(name))
        x, y = torch.empty(batch, 3, size, size), torch.zeros(batch, dtype=torch.long)
        return measure(partial(program, model, x, y), existing=[model, x, y]).peak


def compare_with_reality(name: str, size: int, batch: int) -> tuple[list[dict[str, Any]], float]:
    """Every method really run, and the overlap of the micro-batched choice with the unbatched one."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    x, y = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    rows, chosen = [], {}
    for method in ("forward", "FPS", "FPS, micro-batches of 2", "FPS, micro-batches of 1", "GPS, cross-entropy"):
        report = measure(partial(METHODS[method], model, x, y), existing=[model, x, y])
        imagined = simulate(name, size, batch, METHODS[method])
        rows.append({"model": name, "batch": batch, "method": method, "real": report.peak, "simulated": imagined})
        if isinstance(report.result, Selection):
            chosen[method] = report.result
    overlap = min(chosen["FPS"].overlap(chosen[f"FPS, micro-batches of {n}"]) for n in (1, 2))
    return rows, overlap


def of_model(model: str, size: tuple[int, ...] | None, batch: int) -> dict[str, int]:
    """Peak bytes of every method for one model, simulated.

    Args:
        model: timm's name, or ``module:function``.
        size: of one sample; a timm model knows its own.
        batch: samples at once.

    Raises:
        ValueError: an unknown model, or a function without ``size``.
    """
    create: Callable[[], torch.nn.Module]
    if ":" in model:
        module, _, function = model.partition(":")
        create = getattr(importlib.import_module(module), function)
        if size is None:
            raise ValueError(f"--input is needed with {model}: the size of one sample, such as --input 3 224 224")
    else:
        if not timm.is_model(model):
            raise ValueError(f"timm has no model {model!r}; a function of your own is given as module:function")
        create = partial(timm.create_model, model)
        if size is None:
            with torch.device("meta"):
                size = tuple(create().pretrained_cfg["input_size"])
    found = {}
    for method, program in METHODS.items():
        if method == "GPS, two views" and len(size) != 3:
            continue
        with simulated() as build:
            made = build(create)
            x, y = torch.empty(batch, *size), torch.zeros(batch, dtype=torch.long)
            found[method] = measure(partial(program, made, x, y), existing=[made, x, y]).peak
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ViT-Ti for the comparison with reality, ViT-B and L simulated")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--model", help="timm's name, or module:function: simulate this one, and write no results")
    parser.add_argument("--input", type=int, nargs="+", metavar="N", help="size of one sample, for a function")
    options = parser.parse_args(arguments)
    if options.model is not None:
        try:
            peaks = of_model(options.model, None if options.input is None else tuple(options.input), options.batch)
        except (ValueError, ImportError, AttributeError) as error:
            parser.error(str(error))
        best = peaks["FPS, micro-batches of 1"]
        print(f"{options.model}, batch {options.batch}, float32, simulated; × is over FPS in micro-batches of 1")
        print(table(["method", "peak", "×"], [[m, format_bytes(p), f"{p / best:.1f}"] for m, p in peaks.items()]))
        return

    real_name, real_batch = ("vit_tiny_patch16_224", 8) if options.quick else ("vit_base_patch16_224", options.batch)
    real, overlap = compare_with_reality(real_name, 224, real_batch)
    print(f"{real_name}, batch {real_batch}: peak bytes of live tensors, really run and simulated")
    body = [
        [
            row["method"],
            format_bytes(row["real"]),
            format_bytes(row["simulated"]),
            f"{row['simulated'] / row['real'] - 1:+.2%}",
        ]
        for row in real
    ]
    print(table(["method", "real", "simulated", "difference"], body))
    print(f"\nmicro-batched FPS chooses {overlap:.4%} of the entries that FPS on the whole batch chooses\n")

    rows = []
    for label, (name, size) in list(MODELS.items())[: 2 if options.quick else None]:
        peaks = {method: simulate(name, size, options.batch, program) for method, program in METHODS.items()}
        best = peaks["FPS, micro-batches of 1"]
        for method, peak in peaks.items():
            rows.append(
                {"model": label, "batch": options.batch, "method": method, "simulated": peak, "over_fps": peak / best}
            )
    print(f"batch {options.batch}, float32, simulated; × is over FPS in micro-batches of 1")
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["method"]] = row
    body = [
        [method, *(f"{format_bytes(m[method]['simulated'])} ({m[method]['over_fps']:.1f}×)" for m in by_model.values())]
        for method in METHODS
    ]
    print(table(["method", *by_model], body))
    print("published: FPS needs at least 9× (v1) and 18× (v2) less memory than GPS")
    command = "python -m benchmarks.memory_vs_gps" + (" --quick" if options.quick else "")
    save(
        "memory_vs_gps_quick" if options.quick else "memory_vs_gps",
        command,
        rows,
        reality=real,
        overlap_of_micro_batches=overlap,
    )


if __name__ == "__main__":
    main()
