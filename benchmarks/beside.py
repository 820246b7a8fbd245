"""Chosen entries beside a frozen layer against PEFT's LoRA there: ``python -m benchmarks.beside``.

One linear layer of ViT-B at batch 16, forward and backward with a gradient for its input, as inside of a network: as it is,
with entries beside it (in a fifth of the columns, as FPS chooses them), with LoRA of rank 8. *Bytes* are what is trained,
with gradient and moments of AdamW, and indices.
"""

import argparse
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.shared.measuring import alternate, ratio, save, table
from fps_kernels.weights.matrix import MatrixLayout

RANK, ROUNDS = 8, 15
LAYERS = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
TOKENS = 16 * 197


class Owner(nn.Module):
    """A model of one layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def beside(inputs: int, outputs: int, k: int) -> tuple[nn.Module, int]:
    """A layer with ``k`` entries a neuron beside it, and its bytes."""
    model = Owner(inputs, outputs)
    used = torch.randperm(inputs)[: inputs // 5]
    columns = torch.stack([used[torch.randperm(len(used))[:k]].sort().values for _ in range(outputs)]).flatten().int()
    entries = fps.WeightSelection(MatrixLayout((outputs, inputs)), torch.arange(outputs + 1, dtype=torch.int32) * k, columns)
    tuner = fps.attach(model, fps.Selection({"layer.weight": entries}, ()), beside=True)
    (e,) = tuner._entries.values()
    indices = [e.selection.row_offsets, e.selection.columns, e.order, *([] if e.distinct is None else [e.distinct])]
    return model.layer, 4 * 4 * e.values.numel() + sum(t.nbytes for t in indices)


def lora(inputs: int, outputs: int) -> tuple[nn.Module, int]:
    """The same with LoRA."""
    model = get_peft_model(Owner(inputs, outputs), LoraConfig(r=RANK, target_modules=["layer"], lora_dropout=0.0))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model.base_model.model.layer, 4 * 4 * trained


def there_and_back(layer: nn.Module, x: Tensor) -> None:
    """A forward and a backward pass."""
    y = layer(x.detach().requires_grad_())
    y.backward(torch.ones_like(y))
    for p in layer.parameters():
        p.grad = None


def main() -> None:
    """Measure, print, and write ``results/beside.json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside", description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4], help="entries a neuron")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, (inputs, outputs) in LAYERS.items():
        x = torch.randn(TOKENS, inputs)
        frozen = nn.Linear(inputs, outputs).requires_grad_(False)
        theirs, bytes_of_lora = lora(inputs, outputs)
        made = {k: beside(inputs, outputs, k) for k in options.k}
        contestants = {"frozen": partial(there_and_back, frozen, x), "LoRA": partial(there_and_back, theirs, x)}
        contestants |= {f"k={k}": partial(there_and_back, layer, x) for k, (layer, _) in made.items()}
        times = alternate(contestants, ROUNDS)
        for k, (_, size) in made.items():
            rows.append(
                {
                    "layer": name,
                    "inputs": inputs,
                    "outputs": outputs,
                    "k": k,
                    "over_frozen": ratio(times, f"k={k}", "frozen"),
                    "lora_over_frozen": ratio(times, "LoRA", "frozen"),
                    "over_lora": ratio(times, f"k={k}", "LoRA"),
                    "bytes": size,
                    "lora_bytes": bytes_of_lora,
                }
            )
    body = [
        [f"{row['layer']} [{row['outputs']}, {row['inputs']}]", str(row["k"]), f"{row['over_frozen']:.2f}",
         f"{row['lora_over_frozen']:.2f}", f"{row['over_lora']:.2f}", f"{row['bytes'] / row['lora_bytes']:.2f}"]
        for row in rows
    ]  # fmt: skip
    print(table(["layer", "k", "over frozen", "LoRA over frozen", "over LoRA", "bytes over LoRA's"], body))
    save("beside", "python -m benchmarks.beside", rows, rank=RANK, tokens=TOKENS)


if __name__ == "__main__":
    main()
