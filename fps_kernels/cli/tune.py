"""``fps-kernels tune``."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fps_kernels.cli import options
from fps_kernels.cli.config import Config
from fps_kernels.cli.options import RUN, TRAINING, Device, Precision, ScorerName
from fps_kernels.cli.output import print_json, print_table
from fps_kernels.memory import format_bytes
from fps_kernels.storage.atomic import check_writable

if TYPE_CHECKING:
    from fps_kernels.runs.job import Tuned


class Augment(StrEnum):
    """What is done to training images at random."""

    none = "none"
    flip = "flip"
    crop = "crop"


def tune(
    model: options.Model,
    *,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    stream: options.Stream = False,
    image_size: options.ImageSize = None,
    dtype: options.DType = Precision.fp32,
    device: options.OnDevice = Device.auto,
    drop_path: Annotated[
        float, typer.Option(min=0, max=0.99, help="Rate of stochastic depth.", rich_help_panel=options.MODEL)
    ] = 0.0,
    data: options.Data,
    data_root: options.DataRoot = None,
    download: options.Download = False,
    train_split: options.TrainSplit = None,
    test_split: Annotated[str | None, typer.Option(help="test or val if not given.", rich_help_panel=options.DATA)] = None,
    workers: options.Workers = None,
    seed: options.Seed = 0,
    augment: Annotated[
        Augment, typer.Option(help="crop: a random part of the image, and flip.", rich_help_panel=options.DATA)
    ] = Augment.flip,
    crop_scale: Annotated[
        float, typer.Option(min=0.01, max=1, help="Smallest share of an image in a crop.", rich_help_panel=options.DATA)
    ] = 0.5,
    selection: Annotated[
        Path | None,
        typer.Option(help="A selection file, instead of the options below.", metavar="FILE", rich_help_panel=options.CHOICE),
    ] = None,
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
    epochs: Annotated[int, typer.Option(min=1, help="Times each image is seen.", rich_help_panel=TRAINING)] = 10,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images in a forward pass, of all processes.", rich_help_panel=TRAINING)
    ] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes in a step.", rich_help_panel=TRAINING)] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = 1e-3,
    lr_dense: Annotated[
        float | None, typer.Option(help="Of the parameters trained whole; --lr if not given.", rich_help_panel=TRAINING)
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of the tuned entries.", rich_help_panel=TRAINING)] = 1e-4,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps in which the rate rises.", rich_help_panel=TRAINING)
    ] = 0.1,
    label_smoothing: Annotated[
        float, typer.Option(min=0, max=0.99, help="Of the cross-entropy.", rich_help_panel=TRAINING)
    ] = 0.0,
    clip_grad: Annotated[float | None, typer.Option(help="Largest norm of the gradients.", rich_help_panel=TRAINING)] = None,
    autocast: Annotated[bool, typer.Option("--autocast", help="Compute in bfloat16.", rich_help_panel=TRAINING)] = False,
    deterministic: Annotated[
        bool, typer.Option(help="On a GPU: kernels that give the same bits each time.", rich_help_panel=TRAINING)
    ] = True,
    output: Annotated[Path, typer.Option(help="The tuned entries, a delta file.", metavar="FILE", rich_help_panel=RUN)],
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; OUTPUT with the ending .run if not given.", rich_help_panel=RUN),
    ] = None,
    save_minutes: Annotated[float, typer.Option(min=0, help="Save the run so often.", rich_help_panel=RUN)] = 5.0,
    save_steps: Annotated[int | None, typer.Option(min=1, help="And each so many steps.", rich_help_panel=RUN)] = None,
    log_steps: Annotated[int, typer.Option(min=1, help="Steps in a line of metrics.jsonl.", rich_help_panel=RUN)] = 10,
    eval_epochs: Annotated[
        int, typer.Option(min=0, help="Evaluate each so many epochs, and at the end.", rich_help_panel=RUN)
    ] = 1,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard.", metavar="DIR", rich_help_panel=RUN)
    ] = None,
    bf16_values: Annotated[
        bool, typer.Option("--bf16-values", help="Write the values in bfloat16: a smaller file.", rich_help_panel=RUN)
    ] = False,
    buffers: Annotated[
        bool, typer.Option(help="Also write the buffers that training changed, if any.", rich_help_panel=RUN)
    ] = True,
    json: options.Json = False,
    config: Config = None,
) -> None:
    """Tune the chosen entries of a model on images, and write them to a small delta file.

    Killed at any time and started again with the same command, it goes on and ends with the same weights. Under torchrun
    every batch is split over the processes.

    \b
    Example: fps-kernels tune vit_base_patch16_224 --pretrained --data torch/cifar10 \\
                 --k 4 --epochs 10 --output task.safetensors
    """
    given = locals()
    for name, number in (("--lr", lr), ("--lr-dense", lr_dense), ("--clip-grad", clip_grad)):
        if number is not None and not 0 < number < float("inf"):
            raise ValueError(f"{name} must be positive, got {number}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"--weight-decay must not be negative, got {weight_decay}")
    made: dict[str, object] = {"scorer": scorer != ScorerName.fps, "anchor": anchor, "k": k, "density": density}
    made |= {"global": across, "include": include, "exclude": exclude, "dense": dense, "micro-batch": micro_batch}
    if selection is not None and (clash := next((name for name, given in made.items() if given), None)):
        raise ValueError(f"--selection has its choice made: --{clash} does not go with it")
    check_writable(output)
    folder = output.with_suffix(".run") if run is None else run
    if folder == output:
        raise ValueError(f"--output {output} and the run folder are one path: give another --run")

    from fps_kernels.runs.choice import Choice
    from fps_kernels.runs.images import default_workers, training_and_test_images
    from fps_kernels.runs.job import Job, make_deterministic, tune_model
    from fps_kernels.runs.loop import Habits, Recipe
    from fps_kernels.runs.models import load_model
    from fps_kernels.runs.processes import joined

    choice = options.record(Choice, given, scorer=scorer.value)
    recipe = options.record(Recipe, given, lr_dense=lr if lr_dense is None else lr_dense, augment=augment.value)
    with joined(device.resolve().type == "cuda") as processes:
        place = processes.place(device.resolve())
        if deterministic:
            make_deterministic(place)
        train, test = training_and_test_images(data, train_split, test_split, data_root, download)
        loaded = load_model(
            model,
            checkpoint=checkpoint,
            pretrained=pretrained,
            classes=len(train.classes),
            image_size=image_size,
            dtype=dtype.dtype,
            device=place,
            seed=seed,
            drop_path=drop_path,
            stream=stream,
        )
        job = Job(
            name=model,
            settings={
                "model": model,
                "image_size": image_size,
                "dtype": dtype.value,
                "drop_path": drop_path,
                "stream": stream,
            },
            selection=selection,
            choice=choice,
            recipe=recipe,
            habits=options.record(Habits, given),
            workers=default_workers() if workers is None else workers,
            folder=folder,
            output=output,
            bf16_values=bf16_values,
            buffers=buffers,
            tensorboard=tensorboard,
        )
        tuned = tune_model(job, loaded, train, test, processes)
    if tuned is None:
        return
    if json:
        found = asdict(tuned)
        print_json({"file": str(output), "bytes": found.pop("bytes"), "run": str(folder), **found})
        return
    _print(tuned, output, folder)


def _print(tuned: "Tuned", output: Path, folder: Path) -> None:
    rows = [
        ["accuracy", f"{tuned.accuracy:.2%} of {tuned.test_images:,} test images"],
        ["test loss", f"{tuned.test_loss:.4f}"],
        ["trained", f"{tuned.trained:,} numbers, {tuned.steps:,} steps"],
        ["step", f"{tuned.step_seconds:.3f} s (median)"],
        ["peak memory", "–" if tuned.peak_memory is None else format_bytes(tuned.peak_memory)],
        ["delta", f"{output} ({format_bytes(tuned.bytes)})"],
        ["run", str(folder)],
    ]
    print_table("tuned", ["", "result"], rows)
