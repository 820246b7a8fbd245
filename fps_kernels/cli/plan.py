"""``fps-kernels plan``."""

import re
from typing import Annotated

import typer

from fps_kernels.cli.config import Config
from fps_kernels.cli.options import Precision
from fps_kernels.cli.output import print_json, print_table
from fps_kernels.memory.methods import MEANINGS, METHODS

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_bytes(text: str) -> int:
    """``24GiB``, ``80GB``, ``512MiB`` or a number of bytes.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]I?)?B?\s*", text, re.IGNORECASE)
    try:
        return int(float(found[1]) * _UNITS[(found[2] or "").upper()])  # type: ignore[index]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text!r} is no amount of memory: write 24GiB or 80GB") from error


def plan(
    model: Annotated[str, typer.Argument(help="A timm architecture.", metavar="MODEL")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 8,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16, of weights and activations.")] = "fp32",
    gpu_memory: Annotated[str | None, typer.Option(help="Such as 24GiB: seek the largest batch that fits.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(METHODS)}; may be repeated.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Entries tuned per output neuron.")] = 4,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
    config: Config = None,
) -> None:
    """What each way of choosing and tuning a model would need. Nothing is allocated, no GPU is needed.

    \b
    Example: fps-kernels plan vit_huge_patch14_224 --batch-size 16 \\
                 --dtype bf16 --gpu-memory 24GiB
    """
    from fps_kernels.memory import format_bytes
    from fps_kernels.memory.planning import plan as make_plan

    try:
        precision = Precision(dtype)
    except ValueError as error:
        raise ValueError(f"--dtype must be one of fp32, float32, bf16, bfloat16, got {dtype!r}") from error
    memory = parse_bytes(gpu_memory) if gpu_memory is not None else None
    found = make_plan(model, batch_size, dtype=precision.dtype, memory=memory, methods=method or None, k=k)
    if json:
        print_json([cost.__dict__ for cost in found.costs])
        return
    parts = ("peak", "weights", "activations", "gradients", "optimizer")
    rows = [[c.method, *(format_bytes(getattr(c, part)) for part in parts)] for c in found.costs]
    head = ["method", *parts]
    if memory is not None:
        head.append(f"largest batch in {format_bytes(memory)}")
        for row, cost in zip(rows, found.costs, strict=True):
            row.append("any" if cost.largest_batch is None else str(cost.largest_batch))
    print_table(f"{model}, batch {batch_size}, {dtype}", head, rows)
    for cost in found.costs:
        typer.echo(f"{cost.method}: {MEANINGS[cost.method]}")
    weights = max(cost.weights for cost in found.costs)
    if memory is not None and weights > memory:
        typer.echo(
            f"the weights alone take {format_bytes(weights)}: with --stream, select and tune leave them in their files, and "
            "hold one module's at a time"
        )
