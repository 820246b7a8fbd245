"""What a step costs the host, layer by layer: ``python -m benchmarks.host_overhead [--rounds N] [--quick]``.

A GPU hides arithmetic and not Python. A ViT that is so small that its arithmetic costs nearly nothing shows what is left:
microseconds a weight, over the same model frozen, of forward pass, backward pass, step and zero_grad. Twice, once with
inputs so small that layers keep them whole, and once with inputs of which they keep columns. Contestants take turns in an
order that changes, on one thread. Then what calibration costs beside a forward pass, and what Python takes on the way to a
GPU whose driver does nothing.
"""

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import peft
import torch
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.shared import methods
from benchmarks.shared.calibration_cost import calibration_cost
from benchmarks.shared.launch_cost import launch_cost, layer_cost
from benchmarks.shared.measuring import alternate, ratio, save, table
from benchmarks.shared.models import tiny

PHASES = ("forward", "backward", "step", "zero_grad")
BATCHES = {"small inputs": 1, "kept columns": 8}
WEIGHTS = 12 * 4 + 1  # of which entries are chosen: four in a block, and the patch embedding
TENSORS = 100  # of the optimizer that is given dense gradients


def _frozen(model: nn.Module) -> methods.Contestant:
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head.") or name == "patch_embed.proj.bias")
    return _trained(model)


def _lora(model: nn.Module) -> methods.Contestant:
    """Nothing but LoRA and the head: biases stay frozen, which is what people do and the cheapest."""
    config = peft.LoraConfig(r=8, target_modules=r".*blocks.*(qkv|proj|fc1|fc2)$", modules_to_save=["head"])
    return _trained(peft.get_peft_model(model, config))


def _trained(model: nn.Module) -> methods.Contestant:
    chosen = [p for p in model.parameters() if p.requires_grad]
    return methods.Contestant(model, torch.optim.AdamW(chosen, lr=1e-3, fused=True))


def contestants(x: Tensor) -> dict[str, methods.Contestant]:
    """Models and optimizers that take turns, all from one initialisation."""
    base = tiny().train()
    selection = fps.select(base, [x], budget=fps.PerNeuron(4), progress=False)
    makes: dict[str, Callable[[nn.Module], methods.Contestant]] = {
        "frozen": _frozen,
        "biases and head": methods.biases_and_head,
        "LoRA r=8": _lora,
        "attach, k=4": partial(methods.attached, selection=selection),
    }
    return {name: make(methods.fresh(base)) for name, make in makes.items()}


def phases(made: methods.Contestant, x: Tensor) -> list[float]:
    """Seconds of each phase of one step."""
    at = [time.perf_counter()]
    loss = made.model(x).square().mean()
    at.append(time.perf_counter())
    loss.backward()
    at.append(time.perf_counter())
    made.optimizer.step()
    at.append(time.perf_counter())
    made.optimizer.zero_grad()
    at.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(at)]


def compare(label: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Every contestant's microseconds a weight over the frozen model."""
    x = torch.randn(batch, 3, 32, 32)
    made = contestants(x)
    times: dict[str, list[list[float]]] = {name: [] for name in made}
    gc.collect()
    gc.freeze()
    for turn in range(-5, rounds):  # five that do not count
        names = list(made)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        for name in names[:: 1 if turn % 2 else -1]:
            spent = phases(made[name], x)
            if turn >= 0:
                times[name].append(spent)
    gc.unfreeze()
    middle = {name: [median(column) * 1e6 for column in zip(*rows, strict=True)] for name, rows in times.items()}
    lora = sum(middle["LoRA r=8"]) - sum(middle["frozen"])
    return [
        {
            "inputs": label,
            "method": name,
            **{
                f"{phase}_us_a_weight": (a - b) / WEIGHTS
                for phase, a, b in zip(PHASES, found, middle["frozen"], strict=True)
            },
            "step_us": found[2],
            "total_us": sum(found),
            "over_frozen_against_lora": (sum(found) - sum(middle["frozen"])) / lora,
            "step_against_lora": found[2] / middle["LoRA r=8"][2],
        }
        for name, found in middle.items()
    ]


def dense_gradients(rounds: int) -> dict[str, Any]:
    """``MaskedAdamW(masked_parameters(...))`` beside torch's fused AdamW on the same tensors, one step each."""

    def made(masked: bool) -> Callable[[], object]:
        layers = nn.ModuleList(nn.Linear(48, 48, bias=False) for _ in range(TENSORS))
        masks = {name: torch.rand_like(p) < 0.1 for name, p in layers.named_parameters()}
        for p in layers.parameters():
            p.grad = torch.randn_like(p)
        if masked:
            return fps.MaskedAdamW(fps.masked_parameters(layers, masks), lr=1e-3).step
        return torch.optim.AdamW(layers.parameters(), lr=1e-3, fused=True).step

    times = alternate({"ours": made(True), "fused": made(False)}, 4 * rounds, before=2)
    return {
        "tensors": TENSORS,
        "masked_parameters_us": median(times["ours"]) * 1e3,
        "fused_us": median(times["fused"]) * 1e3,
        "against_fused": ratio(times, "ours", "fused"),
    }


def main() -> None:
    """Run and print everything, write ``results/host_overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="15 rounds")
    options = parser.parse_args()
    rounds = 15 if options.quick else options.rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.collect()
    gc.freeze()  # what is there already is not looked through again and again
    calibration = calibration_cost(rounds=9 if options.quick else 25)
    share, constant = calibration["batch_ratio"], calibration["constant_ms"]
    print(f"calibrate: a batch {share:.2f} × the forward pass, and {constant:.2f} ms a call")
    gpu = {**{f"layer, {name}": us for name, us in layer_cost().items()}, **launch_cost()}
    print(table(["on the way to a GPU", "µs of Python"], [[name, f"{us:.1f}"] for name, us in gpu.items()]))
    rows: list[dict[str, Any]] = []
    for label, batch in BATCHES.items():
        rows += compare(label, batch, rounds)
    print(
        table(
            ["inputs", "method", *(f"{phase}, µs a weight" for phase in PHASES), "over frozen / LoRA", "step / LoRA"],
            [
                [
                    row["inputs"],
                    row["method"],
                    *(f"{row[f'{phase}_us_a_weight']:.1f}" for phase in PHASES),
                    f"{row['over_frozen_against_lora']:.2f}",
                    f"{row['step_against_lora']:.2f}",
                ]
                for row in rows
            ],
        )
    )
    dense = dense_gradients(rounds)
    print(f"masked_parameters, {TENSORS} tensors: step {dense['against_fused']:.2f} × fused AdamW")
    command = "python -m benchmarks.host_overhead" + (" --quick" if options.quick else "")
    save(
        "host_overhead_quick" if options.quick else "host_overhead",
        command,
        rows,
        dense_gradients=dense,
        calibration=calibration,
        gpu=gpu,
    )


if __name__ == "__main__":
    main()
