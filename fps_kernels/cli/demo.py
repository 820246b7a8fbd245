"""``fps-kernels demo``."""

from pathlib import Path
from typing import Annotated

import typer

from fps_kernels.cli.config import Config
from fps_kernels.runs.hints import install_hint


def demo(
    model: Annotated[str | None, typer.Option(help="A timm architecture; without it a small ViT on digits.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Its weights, a safetensors file.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder with train/<class>/* and test/<class>/*.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images; the model's own if not given.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Entries tuned per output neuron.")] = 4,
    epochs: Annotated[int | None, typer.Option(min=1, help="30 for digits, 8 for a folder.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="20 for digits, 32 for a folder.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Repetitions: 3 for digits, 1 for a folder.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of sparse choices: 1e-2 for digits, 1e-3 for a folder.")] = None,
    lr_all: Annotated[float | None, typer.Option(help="Of full tuning: 1e-3 for digits, 1e-4 for a folder.")] = None,
    lr_head: Annotated[float | None, typer.Option(help="Of head and biases: 1e-2 for digits, 3e-3 for a folder.")] = None,
    test_limit: Annotated[int | None, typer.Option(min=1, help="Measure on so many test images.")] = None,
    config: Config = None,
) -> None:
    """Select with FPS, GPS and at random, tune each choice, and print what it cost and what it gave.

    \b
    Example: fps-kernels demo --model vit_small_patch14_dinov2 --checkpoint FILE \\
                 --data DIR --image-size 56
    """
    try:
        from fps_kernels.demo.run import Settings, run
    except ImportError as error:
        raise ImportError(install_hint("the demo", error), name=error.name) from error
    folder = data is not None
    run(
        Settings(
            model=model,
            checkpoint=checkpoint,
            data=data,
            image_size=image_size,
            k=k,
            epochs=epochs or (8 if folder else 30),
            batch_size=batch_size or (32 if folder else 20),
            seeds=seeds or (1 if folder else 3),
            lr=lr or (1e-3 if folder else 1e-2),
            lr_all=lr_all or (1e-4 if folder else 1e-3),
            lr_head=lr_head or (3e-3 if folder else 1e-2),
            test_limit=test_limit,
        )
    )
