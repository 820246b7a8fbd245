"""``fps-kernels evaluate``, ``predict`` and ``export``: a tuned model in use, from its base and its delta."""

import csv
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fps_kernels.cli import options
from fps_kernels.cli.config import Config
from fps_kernels.cli.options import Device, Precision
from fps_kernels.cli.output import print_json, print_table
from fps_kernels.storage.atomic import check_writable, replaced_at_once

if TYPE_CHECKING:
    from fps_kernels.runs.evaluation import Evaluation

DeltaFile = Annotated[Path, typer.Argument(help="What fps-kernels tune wrote.", metavar="DELTA")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a forward pass.", rich_help_panel=options.DATA)]
_LISTED = 30  # classes in the table of a terminal


class Target(StrEnum):
    """What reads the exported model."""

    timm = "timm"
    torch = "torch"
    onnx = "onnx"


def evaluate(
    delta: DeltaFile,
    *,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    dtype: options.DType = Precision.fp32,
    device: options.OnDevice = Device.auto,
    data: options.Data,
    data_root: options.DataRoot = None,
    download: options.Download = False,
    path_column: options.PathColumn = None,
    label_column: options.LabelColumn = None,
    split: Annotated[
        str | None, typer.Option(help="test or val, if there is one; else all images.", rich_help_panel=options.DATA)
    ] = None,
    workers: options.Workers = None,
    batch_size: BatchSize = 32,
    output: Annotated[Path | None, typer.Option(help="Write what was found, as JSON.", metavar="FILE.json")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with pictures, one page.", metavar="REPORT.html")] = None,
    json: options.Json = False,
    config: Config = None,
) -> None:
    """How well a tuned model does: accuracy, class by class, and what it takes for what.

    \b
    Example: fps-kernels evaluate task.safetensors --pretrained --data images/ \\
                 --html report.html
    """
    given = locals()
    for path in (output, html):
        if path is not None:
            check_writable(path)
    from fps_kernels.runs.evaluation import evaluate as measure
    from fps_kernels.runs.images import Reading, default_workers
    from fps_kernels.runs.splits import measured_images
    from fps_kernels.runs.tuned import Tuned

    tuned = Tuned.read(delta)
    images = tuned.labelled(measured_images(options.source(given), split))
    place = device.resolve()
    loaded = tuned.load(checkpoint=checkpoint, pretrained=pretrained, dtype=dtype.dtype, device=place)
    reading = Reading(default_workers() if workers is None else workers, loaded.mode, place.type == "cuda")
    found = measure(loaded, images, reading, batch_size)
    if output is not None:
        found.save(output)
    if html is not None:
        from fps_kernels.cli.inspect import about_file, write_page

        write_page(html, about_file(delta, tuned.delta.selection, tuned.delta), tuned.delta.selection, evaluation=found)
    if json:
        print_json({**asdict(found), "per_class": found.of_classes()})
        return
    _print(found)
    for path in (output, html):
        if path is not None:
            typer.echo(f"written: {path}")


def _print(found: "Evaluation") -> None:
    rows = sorted((row for row in found.of_classes() if row["images"]), key=lambda row: (row["recall"], row["class"]))
    shown = rows[:_LISTED]
    body = [[r["class"], f"{r['images']:,}", *(_percent(r[key]) for key in ("recall", "precision"))] for r in shown]
    title = found.name if len(shown) == len(rows) else f"{found.name}: the {len(shown)} worst of {len(rows)} classes"
    print_table(title, ["class", "images", "recall", "precision"], body)
    confused = sorted(((n, a, b) for a, b, n in found.confusion if a != b), reverse=True)[:5]
    for n, a, b in confused:
        typer.echo(f"{found.classes[a]} taken for {found.classes[b]}: {n:,} times")
    five = "" if found.top5 is None else f", {found.top5:.2%} among the first five"
    typer.echo(f"accuracy: {found.accuracy:.2%} of {found.images:,} images{five}; loss {found.loss:.4f}")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def predict(
    delta: DeltaFile,
    images: Annotated[
        Path, typer.Argument(help="A folder of images, a list of them (.csv, .jsonl), or one.", metavar="IMAGES")
    ],
    *,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    dtype: options.DType = Precision.fp32,
    device: options.OnDevice = Device.auto,
    data_root: options.DataRoot = None,
    path_column: options.PathColumn = None,
    workers: options.Workers = None,
    batch_size: BatchSize = 32,
    top: Annotated[
        int | None, typer.Option(min=1, help="Only the most probable classes, instead of a column for each.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The predictions.", metavar="FILE.csv")],
    config: Config = None,
) -> None:
    """What a tuned model takes images for, with probabilities.

    \b
    Example: fps-kernels predict task.safetensors new-images/ --pretrained \\
                 --output predictions.csv
    """
    check_writable(output)
    from fps_kernels.runs.evaluation import seen_by
    from fps_kernels.runs.images import Reading, default_workers
    from fps_kernels.runs.lists import Columns
    from fps_kernels.runs.progress import progress_bar
    from fps_kernels.runs.splits import Source, unlabelled_images
    from fps_kernels.runs.tuned import Tuned

    tuned = Tuned.read(delta)
    found = unlabelled_images(Source(str(images), data_root, columns=Columns(path_column)))
    place = device.resolve()
    loaded = tuned.load(checkpoint=checkpoint, pretrained=pretrained, dtype=dtype.dtype, device=place)
    reading = Reading(default_workers() if workers is None else workers, loaded.mode, place.type == "cuda")
    classes = tuned.classes
    best = min(top or 1, len(classes))
    names = [f"{what}_{i}" for i in range(1, best + 1) for what in ("class", "probability")]
    with replaced_at_once(output) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *(names if top else ["class", "probability", *classes])])
        with progress_bar() as progress:
            task = progress.add_task("predict", total=len(found), status="")
            for seen in seen_by(loaded, found, reading, batch_size):
                probabilities = seen.logits.softmax(1).cpu()
                order = probabilities.topk(best, 1).indices
                for place_, row, first in zip(seen.places, probabilities.tolist(), order.tolist(), strict=True):
                    likely: list[Any] = [x for i in first for x in (classes[i], f"{row[i]:.6g}")]
                    writer.writerow([found.place(place_), *likely, *([] if top else [f"{p:.6g}" for p in row])])
                progress.advance(task, len(seen.places))
    typer.echo(f"{output}: {len(found):,} images, {len(classes)} classes")


def export(
    delta: DeltaFile,
    output: Annotated[Path, typer.Argument(help="A folder for timm, else a file.", metavar="OUTPUT")],
    *,
    to: Annotated[
        Target, typer.Option("--to", help="timm: a folder; torch: torch.export's .pt2; onnx: ONNX.")
    ] = Target.timm,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    dtype: options.DType = Precision.fp32,
    config: Config = None,
) -> None:
    """The tuned model as a file for others: for timm with its class names and image size, as a program of torch, or as ONNX.

    What was written is loaded and compared with the model.

    \b
    Example: fps-kernels export task.safetensors tuned.onnx --to onnx --pretrained
    """
    check_writable(output if to is not Target.timm else output / "x" if output.is_dir() else output)
    if to is not Target.timm and dtype is not Precision.fp32:
        raise ValueError(f"--to {to.value} is exported in fp32: --dtype {dtype.value} goes with --to timm")
    if (ending := {Target.torch: ".pt2", Target.onnx: ".onnx"}.get(to)) and output.suffix != ending:
        raise ValueError(f"--to {to.value} writes a file that ends with {ending}, got {output}")
    import torch

    from fps_kernels.runs.exporting import export_onnx, export_timm, export_torch
    from fps_kernels.runs.tuned import Tuned

    tuned = Tuned.read(delta)
    loaded = tuned.load(checkpoint=checkpoint, pretrained=pretrained, dtype=dtype.dtype, device=torch.device("cpu"))
    loaded.model.eval()
    {Target.timm: export_timm, Target.torch: export_torch, Target.onnx: export_onnx}[to](loaded, tuned.classes, output)
    typer.echo(f"written: {output}")
