"""``fps-kernels tune``."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fps_kernels.cli import options
from fps_kernels.cli.config import Config, as_config
from fps_kernels.cli.options import AUGMENTATION, MEMORY, RUN, TRAINING, Device, Precision, ScorerName
from fps_kernels.cli.output import print_json, print_table
from fps_kernels.storage.atomic import check_writable

if TYPE_CHECKING:
    from fps_kernels.runs.job import Tuned
    from fps_kernels.runs.range_test import RangeTest


class Augment(StrEnum):
    """What part of training images is shown at random."""

    none = "none"
    flip = "flip"
    crop = "crop"


class Autocast(StrEnum):
    """What is multiplied in."""

    bf16 = "bf16"
    fp16 = "fp16"


class Keep(StrEnum):
    """Which epoch is written."""

    last = "last"
    best = "best"


class Schedule(StrEnum):
    """What the learning rate does after the warm-up."""

    cosine = "cosine"
    constant = "constant"


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
    path_column: options.PathColumn = None,
    label_column: options.LabelColumn = None,
    train_split: options.TrainSplit = None,
    val_split: options.ValidationSplit = None,
    val_share: options.ValidationShare = None,
    test_split: options.TestSplit = None,
    check_images: Annotated[
        bool, typer.Option(help="Look at every image file before any work.", rich_help_panel=options.DATA)
    ] = True,
    workers: options.Workers = None,
    seed: options.Seed = 0,
    augment: Annotated[
        Augment, typer.Option(help="flip: left and right; crop: a random part, and flip.", rich_help_panel=AUGMENTATION)
    ] = Augment.flip,
    crop_scale: Annotated[
        float, typer.Option(min=0.01, max=1, help="Smallest share of an image in a crop.", rich_help_panel=AUGMENTATION)
    ] = 0.5,
    auto_augment: Annotated[
        str | None,
        typer.Option(help="A policy of timm's, such as rand-m9-mstd0.5.", metavar="POLICY", rich_help_panel=AUGMENTATION),
    ] = None,
    color_jitter: Annotated[
        float, typer.Option(min=0, help="Strength of changes of colour.", rich_help_panel=AUGMENTATION)
    ] = 0.0,
    erase: Annotated[
        float, typer.Option(min=0, max=1, help="Chance that a rectangle is erased.", rich_help_panel=AUGMENTATION)
    ] = 0.0,
    mixup: Annotated[
        float, typer.Option(min=0, help="Alpha of mixing two images; 0 for none.", rich_help_panel=AUGMENTATION)
    ] = 0.0,
    cutmix: Annotated[
        float, typer.Option(min=0, help="Alpha of a rectangle of another image; 0 for none.", rich_help_panel=AUGMENTATION)
    ] = 0.0,
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
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; by the budget if not given (docs: choosing k).", rich_help_panel=TRAINING),
    ] = None,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Suggest a rate by a range test, and stop.", rich_help_panel=TRAINING)
    ] = False,
    lr_head: Annotated[
        float, typer.Option(help="Of the classifier, which starts from nothing.", rich_help_panel=TRAINING)
    ] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Of the tuned entries.", rich_help_panel=TRAINING)] = 1e-4,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps in which the rate rises.", rich_help_panel=TRAINING)
    ] = 0.2,
    schedule: Annotated[
        Schedule, typer.Option(help="What the rate does after that.", rich_help_panel=TRAINING)
    ] = Schedule.cosine,
    label_smoothing: Annotated[
        float, typer.Option(min=0, max=0.99, help="Of the cross-entropy.", rich_help_panel=TRAINING)
    ] = 0.0,
    clip_grad: Annotated[float | None, typer.Option(help="Largest norm of the gradients.", rich_help_panel=TRAINING)] = None,
    class_weights: Annotated[
        str | None,
        typer.Option(
            help="balanced: each class counts alike in the loss; or a JSON file of a number for each class.",
            metavar="balanced|FILE",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    ema: Annotated[
        float,
        typer.Option(
            min=0, max=0.9999999, help="Decay of a running average, which is then written.", rich_help_panel=TRAINING
        ),
    ] = 0.0,
    keep: Annotated[
        Keep, typer.Option(help="best: the epoch that is best on validation images.", rich_help_panel=TRAINING)
    ] = Keep.last,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many epochs without a better one.", rich_help_panel=TRAINING),
    ] = None,
    autocast: Annotated[Autocast | None, typer.Option(help="Multiply in a 16-bit dtype.", rich_help_panel=MEMORY)] = None,
    keep_bits: Annotated[
        int | None,
        typer.Option(min=8, max=8, help="Keep what the backward pass needs in 8 bits.", rich_help_panel=MEMORY),
    ] = None,
    grad_checkpointing: Annotated[
        bool, typer.Option("--grad-checkpointing", help="Compute blocks twice, and keep less.", rich_help_panel=MEMORY)
    ] = False,
    deterministic: Annotated[
        bool, typer.Option(help="On a GPU: kernels that give the same bits each time.", rich_help_panel=TRAINING)
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(help="The tuned entries, a delta file; not for --find-lr.", metavar="FILE", rich_help_panel=RUN),
    ] = None,
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
    context: typer.Context,
) -> None:
    """Tune the chosen entries of a model on images, and write them to a small delta file.

    Killed at any time and started again with the same command, it goes on and ends with the same weights. Under torchrun
    every batch is split over the processes.

    \b
    Example: fps-kernels tune vit_base_patch16_224 --pretrained --data torch/cifar10 \\
                 --k 4 --epochs 10 --output task.safetensors
    """
    given = locals()
    for name, number in (("--lr", lr), ("--lr-head", lr_head), ("--clip-grad", clip_grad)):
        if number is not None and not 0 < number < float("inf"):
            raise ValueError(f"{name} must be positive, got {number}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"--weight-decay must not be negative, got {weight_decay}")
    made: dict[str, object] = {"scorer": scorer != ScorerName.fps, "anchor": anchor, "k": k, "density": density}
    made |= {"global": across, "include": include, "exclude": exclude, "dense": dense, "micro-batch": micro_batch}
    if selection is not None and (clash := next((name for name, given in made.items() if given), None)):
        raise ValueError(f"--selection has its choice made: --{clash} does not go with it")
    if val_share is not None and not 0 < val_share < 1:
        raise ValueError(f"--val-share must lie between 0 and 1, got {val_share}")
    if keep_bits is not None and stream:
        raise ValueError("--keep-bits does not go with --stream, which adds entries beside layers")
    folder = _folder(output, run, find_lr)

    from fps_kernels.runs.choice import Choice, entries_per_neuron
    from fps_kernels.runs.images import default_workers
    from fps_kernels.runs.job import Job, make_deterministic, tune_model
    from fps_kernels.runs.loss import class_weights_of
    from fps_kernels.runs.models import load_model
    from fps_kernels.runs.processes import joined
    from fps_kernels.runs.range_test import find_rate
    from fps_kernels.runs.recipe import Habits, Recipe, usual_rate
    from fps_kernels.runs.splits import splits_of

    choice = options.record(Choice, given, scorer=scorer.value)
    with joined(device.resolve().type == "cuda") as processes:
        place = processes.place(device.resolve())
        if deterministic:
            make_deterministic(place)
        splits = splits_of(options.source(given), val_share, seed)
        loaded = load_model(
            model,
            checkpoint=checkpoint,
            pretrained=pretrained,
            classes=len(splits.train.classes),
            image_size=image_size,
            dtype=dtype.dtype,
            device=place,
            seed=seed,
            drop_path=drop_path,
            stream=stream,
        )
        rate = usual_rate(entries_per_neuron(choice, selection, loaded.model)) if lr is None else lr
        recipe = options.record(
            Recipe,
            given,
            lr=rate,
            lr_head=lr_head,
            augment=augment.value,
            schedule=schedule.value,
            keep=keep.value,
            autocast=None if autocast is None else autocast.value,
            class_weights=class_weights_of(class_weights, splits.train),
        )
        settings = {"image_size": image_size, "dtype": dtype.value, "drop_path": drop_path, "stream": stream}
        job = Job(
            name=model,
            settings={"model": model, **settings},
            options=as_config(context, given, leave_out=("output", "run", "json", "find_lr", "tensorboard")),
            selection=selection,
            choice=choice,
            recipe=recipe,
            habits=options.record(Habits, given),
            workers=default_workers() if workers is None else workers,
            folder=folder,
            output=output or folder,
            bf16_values=bf16_values,
            buffers=buffers,
            tensorboard=tensorboard,
            check=check_images,
        )
        if find_lr:
            _print_rates(find_rate(job, loaded, splits.train, processes), json)
            return
        tuned = tune_model(job, loaded, splits, processes)
    if tuned is None:
        return
    if json:
        found = asdict(tuned)
        print_json({"file": str(output), "bytes": found.pop("bytes"), "run": str(folder), **found})
        return
    _print(tuned, output, folder)


def _folder(output: Path | None, run: Path | None, find_lr: bool) -> Path:
    """Of the run."""
    if output is None:
        if not find_lr:
            raise ValueError("--output FILE is missing: where the tuned entries go")
        return Path()
    check_writable(output)
    folder = output.with_suffix(".run") if run is None else run
    if folder == output:
        raise ValueError(f"--output {output} and the run folder are one path: give another --run")
    return folder


def _print_rates(found: "RangeTest", json: bool) -> None:
    if json:
        print_json(asdict(found))
        return
    every = max(1, len(found.rates) // 20)
    rows = [[f"{rate:.2e}", f"{loss:.4f}"] for rate, loss in list(zip(found.rates, found.losses, strict=True))[::every]]
    print_table("range test", ["learning rate", "loss, smoothed"], rows)
    if found.losses[-1] == min(found.losses):
        typer.echo("the loss still fell at the highest rate that was tried: the task is too easy to tell rates apart")
    typer.echo(f"suggested: --lr {found.suggested:.1e}")


def _print(tuned: "Tuned", output: Path | None, folder: Path) -> None:
    from fps_kernels.memory import format_bytes

    five = "" if tuned.top5 is None else f", {tuned.top5:.2%} among the first five"
    rows = [
        ["accuracy", f"{tuned.accuracy:.2%} of {tuned.images:,} {tuned.split} images{five}"],
        [f"{tuned.split} loss", f"{tuned.loss:.4f}"],
        *([] if tuned.best_epoch is None else [["best epoch", str(tuned.best_epoch)]]),
        ["trained", f"{tuned.trained:,} numbers, {tuned.steps:,} steps"],
        ["step", f"{tuned.step_seconds:.3f} s (median)"],
        ["peak memory", "–" if tuned.peak_memory is None else format_bytes(tuned.peak_memory)],
        ["delta", f"{output} ({format_bytes(tuned.bytes)})"],
        ["run", str(folder)],
    ]
    print_table("tuned", ["", "result"], rows)
