"""The work of ``fps-kernels tune``: a selection, the training in a run folder, and the delta at its end."""

import hashlib
import json
import os
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fps_kernels.deltas.buffers import first_of
from fps_kernels.deltas.making import save_delta
from fps_kernels.memory import format_bytes
from fps_kernels.runs.checking import check_images
from fps_kernels.runs.choice import Choice, choose
from fps_kernels.runs.evaluation import Evaluation
from fps_kernels.runs.folder import RunFolder, read_metrics
from fps_kernels.runs.hints import install_hint
from fps_kernels.runs.images import ImageSet, Reading
from fps_kernels.runs.loop import Training
from fps_kernels.runs.models import Loaded
from fps_kernels.runs.processes import Processes
from fps_kernels.runs.progress import note, progress_bar, warn, warnings_in_lines
from fps_kernels.runs.recipe import Habits, Recipe
from fps_kernels.runs.splits import Splits
from fps_kernels.runs.stopping import StopSignal
from fps_kernels.selection import Selection
from fps_kernels.tuning.attaching import attach
from fps_kernels.weights.fingerprint import fingerprint


@dataclass(frozen=True)
class Job:
    """What ``fps-kernels tune`` was asked for.

    Attributes:
        name: of the architecture.
        settings: of the model, which the run depends on beside the recipe and the choice.
        options: of the command, as a config file has them.
        selection: a file, or ``None``: choose by ``choice``.
        choice: how to choose.
        recipe: how to train.
        habits: how often to save, log and evaluate.
        workers: processes that read images.
        folder: of the run.
        output: the delta.
        bf16_values: write its values in bfloat16.
        buffers: hold the buffers that training changed.
        tensorboard: folder for TensorBoard.
        check: look at all images first.
    """

    name: str
    settings: dict[str, Any]
    options: dict[str, Any]
    selection: Path | None
    choice: Choice
    recipe: Recipe
    habits: Habits
    workers: int
    folder: Path
    output: Path
    bf16_values: bool
    buffers: bool
    tensorboard: Path | None
    check: bool


@dataclass(frozen=True)
class Tuned:
    """What came of a run.

    Attributes:
        bytes: of the delta file.
        steps: of the whole run.
        trained: numbers that were trained.
        split: ``test`` or ``validation``: what the model was measured on at the end.
        images: their number.
        accuracy: share of them that is classified correctly.
        top5: share of them whose label is among the five most probable classes, ``None`` for up to five classes.
        loss: mean cross-entropy on them.
        best_epoch: the epoch that was kept, ``None`` where it is the last one.
        step_seconds: median over the records of the metrics.
        peak_memory: bytes, ``None`` where the run was at its end already.
    """

    bytes: int
    steps: int
    trained: int
    split: str
    images: int
    accuracy: float
    top5: float | None
    loss: float
    best_epoch: int | None
    step_seconds: float
    peak_memory: int | None


def make_deterministic(device: torch.device) -> None:
    """On a GPU: the same bits in every run, by kernels that are slower where there is a choice."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def tune_model(job: Job, loaded: Loaded, splits: Splits, processes: Processes | None = None) -> Tuned | None:
    """Tune, or go on with the run that is in the folder, and write the delta. Of several processes the first one writes,
    and the others return ``None``.

    Raises:
        ValueError: a folder of another run, or one that another process works in; see :class:`Training`.
        InterruptedRunError: a signal; the run is saved.
        ImportError: TensorBoard was asked for and is missing.
    """
    processes = Processes() if processes is None else processes
    writer = _tensorboard_writer() if job.tensorboard is not None and processes.first else None
    train = splits.train
    _check(job.recipe, splits)
    if job.recipe.grad_checkpointing:
        _checkpoint_blocks(job.name, loaded)
    settings = {**job.settings, "base": fingerprint(loaded.model)}
    named = {"train": train, "validation": splits.validation, "test": splits.test}
    settings |= {name: None if images is None else images.digest() for name, images in named.items()}
    settings |= asdict(job.recipe)
    if job.selection is None:
        anchor = None if job.choice.anchor is None else str(job.choice.anchor)
        settings["choice"] = {**asdict(job.choice), "anchor": anchor}
    else:
        settings["selection"] = hashlib.sha256(job.selection.read_bytes()).hexdigest()
    reading = Reading(job.workers, loaded.mode, loaded.device.type == "cuda")
    folder = RunFolder(job.folder)
    with folder.held() if processes.first else nullcontext():
        if processes.first:
            folder.check_settings(settings, job.options)
            if job.check and not folder.selection.is_file():
                check_images(named.values(), job.workers)
        chosen = _chosen(job, folder, loaded, train, reading, processes)
        about = {"model": job.name, "image_size": str(loaded.config["input_size"][-1])}
        about["classes"] = json.dumps(train.classes, ensure_ascii=False)
        if loaded.files is None:  # weights that stay in their files are not here to be looked at
            about["frozen"] = fingerprint(loaded.model, without=chosen.dense)  # a new head is drawn: no part of the base
        chosen = replace(chosen, description={**chosen.description, **about})
        beside = loaded.files is not None
        with (
            loaded.present(),
            attach(loaded.model, chosen.to(loaded.device), beside=beside, keep_bits=job.recipe.keep_bits) as tuner,
            progress_bar() as progress,
        ):
            task = progress.add_task("tune", total=1, status="")
            say: Callable[[str], None] = note if progress.disable else progress.console.print

            def on_record(record: dict[str, Any]) -> None:
                if record["type"] == "eval":
                    epoch = f"epoch {record['epoch']}/{job.recipe.epochs}"
                    say(f"{epoch}: accuracy {record['accuracy']:.2%}, {record['split']} loss {record['loss']:.4f}")
                if board is not None:
                    _plot(board, record)

            def on_step(step: int, loss: float | None) -> None:
                epoch = min(job.recipe.epochs, 1 + step // training.order.steps_per_epoch)
                known = "" if loss is None else f" loss {loss:.3f}"
                progress.update(task, completed=step, status=f"epoch {epoch}/{job.recipe.epochs}{known}")

            if processes.size > 1:
                tuner.compare_across_processes(None)
            training = Training(
                loaded, tuner, splits, reading, job.recipe, job.habits, folder, processes, on_record, on_step
            )
            progress.update(task, total=training.order.steps, completed=training.at.step)
            if training.resumed:
                say(f"resumed at step {training.at.step:,} of {training.order.steps:,} from {folder.path}")
            # Points of steps that are done again are taken off the board.
            purge = training.at.step + 1 if training.resumed else None
            board = None if writer is None else writer(str(job.tensorboard), purge_step=purge)
            with StopSignal() as stop:
                training.run(stop)
            with training.result():
                found = _measured(training, splits)
                if processes.first:
                    with warnings_in_lines():
                        save_delta(tuner, job.output, torch.bfloat16 if job.bf16_values else None, job.buffers)
                    told = tuner.buffers.changed(loaded.model)
            if not processes.first:
                return None
        if board is not None:
            board.close()
        if lost := [name for name in training.changed_buffers() if name not in told]:
            warn(f"the model changed {first_of(lost)} while it was tuned: no checkpoint and no delta holds such buffers")
        return _outcome(job, training, found)


def _chosen(
    job: Job, folder: RunFolder, loaded: Loaded, images: ImageSet, reading: Reading, processes: Processes
) -> Selection:
    """The selection of the run: that of the file, the one chosen before, or a new one, kept in the folder."""
    if processes.as_first(folder.selection.is_file()):
        return Selection.load(folder.selection)
    if job.selection is not None:
        found = Selection.load(job.selection)
    else:
        made = choose(loaded, images, job.choice, reading, processes)
        found = made.selection.to("cpu")
        if not processes.first:
            return found
        folder.note_choosing({"seconds": made.seconds, "peak_memory": made.peak_memory, "images": made.images})
        note(
            f"chosen: {found.nnz:,} entries, {found.density:.3%}, by {found.description['scorer']} from {made.images} "
            f"images in {made.seconds:.1f} s, peak memory {format_bytes(made.peak_memory)}"
        )
    if processes.first:
        found.save(folder.selection)
    return found


def _tensorboard_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(install_hint("--tensorboard", error, "tensorboard"), name=error.name) from error
    return SummaryWriter


def _plot(board: Any, record: dict[str, Any]) -> None:
    if record["type"] in ("train", "eval"):
        for key in ("loss", "accuracy", "lr", "step_seconds"):
            if key in record:
                board.add_scalar(f"{record['type']}/{key}", record[key], record["step"])
        board.flush()


def _measured(training: Training, splits: Splits) -> Evaluation:
    """The tuned model on the test images, or on the validation images where there are no others; once in a run."""
    folder, images = training.folder, splits.test or splits.validation
    assert images is not None
    if training.processes.as_first(folder.evaluation.is_file()):
        return Evaluation.load(folder.evaluation)
    last = training.last_evaluation
    known = last is not None and images is splits.watched and training.recipe.keep == "last"
    found = last if known and last is not None else training.evaluate(images)
    training.processes.barrier()  # all have asked whether it is there
    if training.processes.first:
        found.save(folder.evaluation)
    return found


def _check(recipe: Recipe, splits: Splits) -> None:
    """Nothing is chosen by test images."""
    if splits.validation is None:
        for wanted, option in ((recipe.keep == "best", "--keep best"), (recipe.patience is not None, "--patience")):
            if wanted:
                raise ValueError(
                    f"{option} needs validation images, since test images choose nothing: a folder val beside train and "
                    "test, or --val-share 0.2"
                )


def _checkpoint_blocks(name: str, loaded: Loaded) -> None:
    switch = getattr(loaded.model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise ValueError("it has no set_grad_checkpointing")
        switch(True)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"--grad-checkpointing: {name} cannot compute its blocks again: {error}") from error


def _outcome(job: Job, training: Training, found: Evaluation) -> Tuned:
    records = read_metrics(training.folder.metrics)
    return Tuned(
        bytes=job.output.stat().st_size,
        steps=training.at.step,
        trained=sum(p.numel() for p in training.tuner.parameters()),
        split="test" if training.splits.test is not None else "validation",
        images=found.images,
        accuracy=found.accuracy,
        top5=found.top5,
        loss=found.loss,
        best_epoch=training.at.best_epoch if job.recipe.keep == "best" else None,
        step_seconds=statistics.median([r["step_seconds"] for r in records if r["type"] == "train"]),
        peak_memory=max((r["peak_memory"] for r in records if "peak_memory" in r), default=None),
    )
