"""Bytes of keeping an inference server up to date: ``python -m benchmarks.weight_sync``.

A language model of 0.6 B parameters in bfloat16 (Qwen3's sizes, random weights), tuned by 1, 4 or 16 entries of each output
neuron of its blocks. What goes over the wire: all weights; the first message of a selection, with positions; every further
one, which has values alone; and TRL's file of the same step. Exact: nothing is timed.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import fps_kernels as fps
from benchmarks.shared.measuring import save, table
from fps_kernels.deltas.weight_sync import WeightSync, write_patches
from fps_kernels.memory import format_bytes

KS = (1, 4, 16)


def model() -> nn.Module:
    """Qwen3-0.6B's sizes."""
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        made = Qwen3ForCausalLM(config).to(torch.bfloat16)
    made.to_empty(device="cpu")
    made.tie_weights()
    for p in made.parameters():
        nn.init.normal_(p, std=0.02)
    made.model.rotary_emb = type(made.model.rotary_emb)(config)  # whose buffers were empty
    return made


def main() -> None:
    """Print the table and write the results."""
    made = model()
    tokens = torch.randint(0, 1000, (1, 32))
    every = sum(p.numel() * p.element_size() for p in made.parameters())
    rows = []
    for k in KS:
        selection = fps.select(
            made,
            [tokens],
            budget=fps.PerNeuron(k),
            include=["model.layers.*"],
            dense=[],
            forward=lambda m, x: m.model(x),
            progress=False,
        )
        with fps.attach(made, selection) as tuner, tempfile.TemporaryDirectory() as folder:
            sync = WeightSync(tuner)
            entries = sync.values().numel()
            file = write_patches(Path(folder) / "patch.safetensors", sync.patches())
            rows.append(
                {
                    "k": k,
                    "entries": entries,
                    "density": selection.density,
                    "full": every,
                    "first": sync.bytes_at_first,
                    "further": sync.bytes_each_time,
                    "trl_file": file,
                }
            )
    head = ["k", "entries", "all weights", "first message", "every further one", "of all weights", "TRL's file"]
    body = [
        [
            str(r["k"]),
            f"{r['entries']:,}",
            *(format_bytes(r[key]) for key in ("full", "first", "further")),
            f"{r['further'] / r['full']:.2%}",
            format_bytes(r["trl_file"]),
        ]
        for r in rows
    ]
    print(table(head, body))
    save("weight_sync", "python -m benchmarks.weight_sync", rows)


if __name__ == "__main__":
    main()
