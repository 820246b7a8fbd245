"""Time of choosing over a bare forward pass: ``python -m benchmarks.selection_time [--quick]``.

One batch of 16 images, ViT-B/16, float32. Contestants take turns; ratios are medians over the rounds. ``naive`` is what
research code does: a hook on every linear layer with ``x.abs().mean``, then ``(W.abs() * a).topk(1)``.

A hundredth of a forward is less than what whole runs differ by on a busy machine. So the time that one selection adds is
also taken inside it: the calls of the statistics kernels, where they happen, and the choice after the pass.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.shared.measuring import alternate, ratio, save, table
from fps_kernels import ops
from fps_kernels.ops import native


def naive(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Hooks and torch."""
    means: dict[nn.Module, Tensor] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            handles.append(
                module.register_forward_pre_hook(lambda m, args: means.__setitem__(m, args[0].abs().mean((0, 1))))
            )
    with torch.no_grad():
        model(x)
        chosen = {name: (m.weight.abs() * means[m]).topk(1).indices for name, m in model.named_modules() if m in means}
    for handle in handles:
        handle.remove()
    return chosen


def inside(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Milliseconds of one selection: in the statistics kernels, in the choice, and in all the rest (the forward)."""
    spent = 0.0

    def timed(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = op(*args)
            spent += time.perf_counter() - start
            return result

        return run

    # The inputs of plain linear layers go to the kernel itself, all others through the ops.
    places = [(ops, "column_norm_"), (ops, "column_norm_conv2d_"), (native.ColumnNorms, "add")]
    norms = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, op in norms:
        setattr(place, name, timed(op))
    try:
        start = time.perf_counter()
        stats = fps.calibrate(model, [x], progress=False)
        middle = time.perf_counter()
        fps.select(model, stats=stats)
        end = time.perf_counter()
    finally:
        for place, name, op in norms:
            setattr(place, name, op)
    return {"statistics": spent * 1e3, "choice": (end - middle) * 1e3, "rest": (middle - start - spent) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ViT-S, few rounds")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    name = "vit_small_patch16_224" if options.quick else "vit_base_patch16_224"
    rounds = options.rounds or (5 if options.quick else 15)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x, y = torch.randn(16, 3, 224, 224), torch.randint(1000, (16,))

    def forward() -> None:
        with torch.no_grad():
            model(x)

    contestants = {
        "forward": forward,
        "FPS, top-1": lambda: fps.select(model, [x], progress=False),
        "FPS, top-8": lambda: fps.select(model, [x], budget=fps.PerNeuron(8), progress=False),
        "FPS, global 1 %": lambda: fps.select(model, [x], budget=fps.Global(0.01), progress=False),
        "statistics alone": lambda: fps.calibrate(model, [x], progress=False),
        "naive hooks, top-1": lambda: naive(model, x),
    }
    times = alternate(contestants, rounds)
    gps = {
        "forward": forward,
        "GPS, cross-entropy": lambda: fps.gps_select(model, [(x, y)], loss="cross_entropy", progress=False),
    }
    gps_times = alternate(gps, 2 if options.quick else 4)
    rows = [
        {"method": method, "ms": statistics.median(values), "over_forward": ratio(times, method, "forward")}
        for method, values in times.items()
    ]
    method = "GPS, cross-entropy"
    rows.append(
        {"method": method, "ms": statistics.median(gps_times[method]), "over_forward": ratio(gps_times, method, "forward")}
    )
    parts = [inside(model, x) for _ in range(rounds)]
    for part in ("statistics", "choice"):
        share = statistics.median(p[part] / p["rest"] for p in parts)
        ms = statistics.median(p[part] for p in parts)
        rows.append({"method": f"inside FPS, top-1: {part}", "ms": ms, "over_forward": share})
    print(f"{name}, one batch of 16, {torch.get_num_threads()} threads, {rounds} rounds; target for FPS: ≤ 1.01×")
    body = [[str(row["method"]), f"{row['ms']:.0f}", f"{row['over_forward']:.3f}×"] for row in rows]
    print(table(["method", "ms", "over forward"], body))
    save(
        "selection_time_quick" if options.quick else "selection_time",
        "python -m benchmarks.selection_time" + (" --quick" if options.quick else ""),
        rows,
        model=name,
    )


if __name__ == "__main__":
    main()
