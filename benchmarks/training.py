"""What a training step costs: ``python -m benchmarks.training [--models ViT-S/16 ...] [--quick]``.

Peak bytes of live tensors of two steps (the second has the optimizer's state), exact; and the time of a step that follows
one of the same method, every method in turn. Full tuning, the head only, LoRA r=8, PEFT's SHiRA and Super-Tuning, dense
gradients with masks, and this package with 1, 4 and 16 entries an output neuron; the main ones also with what backward
keeps in 8 bits. Weights are random, so that a choice
spreads over more columns than that of a pretrained network: the less favourable case.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
from torch import nn

import fps_kernels as fps
from benchmarks.shared import methods
from benchmarks.shared.measuring import alternate, ratio, save, table
from fps_kernels.memory import format_bytes, measure
from fps_kernels.memory.planning import METHODS

Make = Callable[[nn.Module], methods.Contestant]
NAMES = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224"}
LARGE = {"ViT-B/16": "vit_base_patch16_224", "ViT-L/16": "vit_large_patch16_224", "ViT-H/14": "vit_huge_patch14_224"}


def contestants(model: nn.Module, x: torch.Tensor, ks: tuple[int, ...]) -> dict[str, Make]:
    """Every method; the peers that choose entries get about as many as ours with 4 an output neuron."""
    selections = {k: fps.select(model, [x], budget=fps.PerNeuron(k), progress=False) for k in ks}
    middle = selections[4 if 4 in selections else ks[0]]
    rank, density = methods.budget_of_peft(middle)
    return {
        "full": methods.full,
        "head only": methods.head_only,
        "floor (no weight gradient)": methods.floor,
        "LoRA r=8": methods.lora,
        f"PEFT SHiRA r={rank}": partial(methods.shira, rank=rank),
        "PEFT Supertuning": partial(methods.supertuning, density=density),
        "masked dense gradient": partial(methods.masked_gradient, selection=middle),
        **{f"attach, k={k}": partial(methods.attached, selection=selection) for k, selection in selections.items()},
        **{
            f"{name}, 8 bits": partial(_in_8_bits, make)
            for name, make in {
                "full": methods.full,
                "LoRA r=8": methods.lora,
                f"PEFT SHiRA r={rank}": partial(methods.shira, rank=rank),
            }.items()
        },
        **{
            f"attach, k={k}, 8 bits": partial(methods.attached, selection=selection, keep_bits=8)
            for k, selection in selections.items()
        },
    }


def _in_8_bits(make: Make, model: nn.Module) -> methods.Contestant:
    return methods.in_8_bits(make(model))


def peak(model: nn.Module, make: Make, x: torch.Tensor, y: torch.Tensor) -> tuple[int, int]:
    """Peak bytes of two steps, everything included, and how many numbers are trained."""
    made = make(model)

    def run() -> None:
        for _ in range(2):
            made.step(x, y)

    return measure(run, existing=[made.model, x, y]).peak, made.trained


def compare(label: str, model: nn.Module, batch: int, ks: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Memory and time of every method on one model."""
    size = model.patch_embed.img_size
    x, y = torch.randn(batch, 3, *size), torch.randint(model.num_classes, (batch,))
    makes = contestants(model, x, ks)
    peaks = {name: peak(methods.fresh(model), make, x, y) for name, make in makes.items()}
    made = {name: make(methods.fresh(model)) for name, make in makes.items()}
    times = alternate({name: partial(c.step, x, y) for name, c in made.items()}, rounds, before=1)
    return [
        {
            "model": label,
            "batch": batch,
            "method": name,
            "trained": trained,
            "peak_bytes": bytes_,
            "step_ms": median(times[name]),
            "time_over_full": ratio(times, name, "full"),
            "time_over_lora": ratio(times, name, "LoRA r=8"),
        }
        for name, (bytes_, trained) in peaks.items()
    ]


def simulate(label: str, name: str, batch: int) -> list[dict[str, Any]]:
    """Peak memory at a batch that does not fit here."""
    planned = fps.memory.plan(name, batch, methods=[m for m in METHODS if m.startswith(("full", "LoRA", "attach"))], k=4)
    return [
        {"model": label, "batch": batch, "method": cost.method, "peak_bytes": cost.peak, "simulated": True}
        for cost in planned.costs
    ]


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "convolution"),
    "attention": ("scaled_dot_product",),
    "gradients of chosen entries": ("sampled_grad", "_LinearBackward", "_LayerBackward"),
    "GELU and LayerNorm": ("gelu", "layer_norm"),
    "optimizer": ("adamw", "Optimizer"),
}


def profiled(model: nn.Module, batch: int, k: int) -> dict[str, float]:
    """Share of a step's time in each kind of work, by torch's profiler; what is computed again counts as ``other``."""
    x, y = torch.randn(batch, 3, *model.patch_embed.img_size), torch.randint(model.num_classes, (batch,))
    made = contestants(model, x, (k,))[f"attach, k={k}"](methods.fresh(model))
    made.step(x, y)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        made.step(x, y)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    shares = dict.fromkeys((*KINDS, "other"), 0.0)
    for key, spent in times.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in key for part in parts)), "other")
        shares[kind] += spent / total
    return shares


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one model."""
    body = [
        [
            row["method"],
            f"{row['trained']:,}" if "trained" in row else "",
            format_bytes(row["peak_bytes"]),
            f"{row['step_ms']:.0f} ms" if "step_ms" in row else "",
            f"{row['time_over_full']:.2f}" if "step_ms" in row else "",
            f"{row['time_over_lora']:.2f}" if "step_ms" in row else "",
        ]
        for row in rows
    ]
    kind = ", simulated" if rows[0].get("simulated") else ""
    print(f"\n{rows[0]['model']}, batch {rows[0]['batch']}, float32{kind}")
    print(table(["method", "trained", "peak", "step", "over full", "over LoRA"], body))


def main() -> None:
    """Run and print everything, write ``results/training.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="ViT-Ti only, no simulation")
    parser.add_argument("--no-simulation", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    chosen = {"ViT-Ti/16": "vit_tiny_patch16_224"} if options.quick else {n: NAMES[n] for n in options.models}
    shares = {}
    for label, name in chosen.items():
        found = compare(label, timm.create_model(name), options.batch, (1, 4, 16), options.rounds)
        show(found)
        rows += found
        shares[label] = profiled(timm.create_model(name), options.batch, 4)
        print(f"where the time of attach, k=4 goes: {', '.join(f'{kind} {s:.1%}' for kind, s in shares[label].items())}")
    if not options.quick and not options.no_simulation:
        for label, name in LARGE.items():
            found = simulate(label, name, 64)
            show(found)
            rows += found
    command = "python -m benchmarks.training" + (" --quick" if options.quick else "")
    save("training_quick" if options.quick else "training", command, rows, shares_of_time=shares)


if __name__ == "__main__":
    main()
