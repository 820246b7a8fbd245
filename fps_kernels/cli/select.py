"""``fps-kernels select``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fps_kernels.cli import options
from fps_kernels.cli.config import Config
from fps_kernels.cli.options import Device, Precision, ScorerName
from fps_kernels.cli.output import print_json, print_selection
from fps_kernels.runs.progress import note
from fps_kernels.storage.atomic import check_writable


def select(
    model: options.Model,
    *,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    stream: options.Stream = False,
    image_size: options.ImageSize = None,
    dtype: options.DType = Precision.fp32,
    device: options.OnDevice = Device.auto,
    data: options.Data,
    data_root: options.DataRoot = None,
    download: options.Download = False,
    path_column: options.PathColumn = None,
    label_column: options.LabelColumn = None,
    train_split: options.TrainSplit = None,
    workers: options.Workers = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.", rich_help_panel=options.DATA)] = 32,
    seed: options.Seed = 0,
    scorer: options.Scorer = ScorerName.fps,
    anchor: options.Anchor = None,
    k: options.PerRow = None,
    density: options.Density = None,
    across: options.Global_ = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    dense: options.Dense = None,
    samples: options.Samples = 1024,
    micro_batch: options.MicroBatch = None,
    output: Annotated[Path, typer.Option(help="The selection, a safetensors file.", metavar="FILE")],
    json: options.Json = False,
    config: Config = None,
) -> None:
    """Choose the entries worth tuning for some images: forward passes only, no labels, no gradients.

    \b
    Example: fps-kernels select vit_base_patch16_224 --pretrained --data torch/cifar10 \\
                 --k 4 --output fps.safetensors
    """
    given = locals()
    check_writable(output)
    from fps_kernels.memory import format_bytes
    from fps_kernels.runs.choice import Choice, choose
    from fps_kernels.runs.images import Reading, default_workers
    from fps_kernels.runs.models import load_model
    from fps_kernels.runs.splits import training_images

    choice = options.record(Choice, given, scorer=scorer.value)
    place = device.resolve()
    images = training_images(options.source(given))
    loaded = load_model(
        model,
        checkpoint=checkpoint,
        pretrained=pretrained,
        classes=max(2, len(images.classes)),
        image_size=image_size,
        dtype=dtype.dtype,
        device=place,
        seed=seed,
        stream=stream,
    )
    reading = Reading(default_workers() if workers is None else workers, loaded.mode, place.type == "cuda")
    chosen = choose(loaded, images, choice, reading)
    side = str(loaded.config["input_size"][-1])
    described = {**chosen.selection.description, "model": model, "image_size": side, "images": str(chosen.images)}
    selection = replace(chosen.selection.to("cpu"), description=described)
    selection.save(output)
    cost = {"seconds": round(chosen.seconds, 3), "peak_memory": chosen.peak_memory}
    if json:
        about = {"file": str(output), "entries": selection.nnz, "density": selection.density}
        rows = selection.summary()
        numbers = {"image_size": int(side), "images": chosen.images}
        print_json({**about, "trained_whole": len(selection.dense), **described, **numbers, **cost, "weights": rows})
        return
    print_selection(f"{model}: {described['scorer']}, {described['budget']}, {chosen.images} images", selection)
    typer.echo(
        f"chosen: {selection.nnz:,} entries, {selection.density:.3%}; {len(selection.dense)} parameters trained whole"
    )
    typer.echo(f"time: {chosen.seconds:.1f} s, peak memory: {format_bytes(chosen.peak_memory)}")
    typer.echo(f"written: {output}")
    if selection.skipped:
        why: dict[str, int] = {}
        for reason in selection.skipped.values():
            why[reason] = why.get(reason, 0) + 1
        listed = (f"{count} {'weight' if count == 1 else 'weights'}: {reason}" for reason, count in why.items())
        note("not chosen from: " + "; ".join(listed))
