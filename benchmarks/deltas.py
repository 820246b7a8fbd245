"""What a delta file costs: ``python -m benchmarks.deltas [--quick]``.

Bytes an entry on disk, and the time of changing tasks on a model that stays in memory, against the time of touching the same
entries by torch: reading each once and writing each once. ``apply_`` with its check of the base, and without it.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.shared.measuring import alternate, ratio, save, table
from fps_kernels.deltas.delta import Delta
from fps_kernels.deltas.making import delta_of


def tuned(model: nn.Module, budget: fps.PerNeuron | fps.Global) -> Delta:
    """A delta whose values all differ from the base."""
    twin = copy.deepcopy(model)
    size = twin.patch_embed.img_size
    tuner = fps.attach(twin, fps.select(twin, [torch.randn(1, 3, *size)], budget=budget, progress=False))
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return delta_of(tuner)


def touching(model: nn.Module, delta: Delta) -> Any:
    """Reads every entry of the delta in the model, and writes its tuned value there, by torch's own indexing."""
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    parameters = dict(model.named_parameters())
    for name, w in delta.selection.items():
        pairs.append((w.layout.matrix(parameters[name]).view(-1), w.flat(), delta.values[name]))
    whole = [(parameters[name].detach(), values) for name, values in delta.dense.items()]

    def touch() -> None:
        before = [(flat, places, flat[places]) for flat, places, _ in pairs]
        kept = [(p, p.clone()) for p, _ in whole]
        for flat, places, values in pairs:
            flat[places] = values
        for p, values in whole:
            p.copy_(values)
        for flat, places, values in before:
            flat[places] = values
        for p, values in kept:
            p.copy_(values)

    return touch


def main() -> None:
    """Run and print everything, write ``results/deltas.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ViT-Ti and few rounds")
    options = parser.parse_args()
    name = "vit_tiny_patch16_224" if options.quick else "vit_base_patch16_224"
    model = timm.create_model(name).eval()
    rows: list[dict[str, Any]] = []
    for budget in (fps.PerNeuron(1), fps.PerNeuron(8), fps.Global(0.01)):
        delta = tuned(model, budget)
        with tempfile.TemporaryDirectory() as folder:
            sizes = {}
            for dtype in (torch.float32, torch.bfloat16):
                delta.save(Path(folder) / "task.safetensors", dtype)
                sizes[dtype] = (Path(folder) / "task.safetensors").stat().st_size / delta.entries

        def swap(check: bool, delta: Delta = delta) -> None:
            delta.apply_(model, check_base=check)
            delta.revert_(model)

        ways = {
            "touch": touching(model, delta),
            "swap": lambda swap=swap: swap(False),
            "swap, base checked": lambda swap=swap: swap(True),
        }
        times = alternate(ways, 5 if options.quick else 25)
        rows.append(
            {
                "model": name,
                "budget": repr(budget),
                "entries": delta.entries,
                "bytes_float32": sizes[torch.float32],
                "bytes_bfloat16": sizes[torch.bfloat16],
                "touch_ms": median(times["touch"]),
                "swap_ms": median(times["swap"]),
                "swap_over_touch": ratio(times, "swap", "touch"),
                "checked_ms": median(times["swap, base checked"]),
                "checked_over_touch": ratio(times, "swap, base checked", "touch"),
            }
        )
    head = [
        "budget",
        "entries",
        "bytes an entry",
        "in bfloat16",
        "touch",
        "apply_ + revert_",
        "ratio",
        "base checked",
        "ratio",
    ]
    body = [
        [
            row["budget"],
            f"{row['entries']:,}",
            f"{row['bytes_float32']:.2f}",
            f"{row['bytes_bfloat16']:.2f}",
            f"{row['touch_ms']:.1f} ms",
            f"{row['swap_ms']:.1f} ms",
            f"{row['swap_over_touch']:.2f}",
            f"{row['checked_ms']:.1f} ms",
            f"{row['checked_over_touch']:.2f}",
        ]
        for row in rows
    ]
    print(f"{name}, float32, head and biases included")
    print(table(head, body))
    command = "python -m benchmarks.deltas" + (" --quick" if options.quick else "")
    save("deltas_quick" if options.quick else "deltas", command, rows)


if __name__ == "__main__":
    main()
