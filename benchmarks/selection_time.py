"""Time of choosing over a bare forward pass: ``python -m benchmarks.selection_time [--quick]``.

One batch of 16 images, ViT-B/16, float32. Contestants take turns; ratios are medians over the rounds. ``naive`` is what
research code does: a hook on every linear layer with ``x.abs().mean``, then ``(W.abs() * a).topk(1)``.
"""

import argparse
import statistics

import timm
import torch
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.measuring import alternate, ratio, save, table


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
    print(f"{name}, one batch of 16, {torch.get_num_threads()} threads, {rounds} rounds; target for FPS: ≤ 1.01×")
    body = [[str(row["method"]), f"{row['ms']:.0f}", f"{row['over_forward']:.3f}×"] for row in rows]
    print(table(["method", "ms", "over forward"], body))
    save("selection_time", "python -m benchmarks.selection_time" + (" --quick" if options.quick else ""), rows, model=name)


if __name__ == "__main__":
    main()
