"""The demo itself: select with FPS, GPS and at random, tune each choice, print what it cost and what it gave."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from fps_kernels.choosing.budgets import PerNeuron
from fps_kernels.choosing.gps import gps_select, random_views
from fps_kernels.choosing.scorers import FPS, Random
from fps_kernels.choosing.select import select
from fps_kernels.demo.compare import Outcome, accuracy, step_peak, tune
from fps_kernels.demo.data import NEW_DIGITS, Task, digits, image_folder
from fps_kernels.demo.digits import digits_vit
from fps_kernels.memory import MemoryReport, format_bytes, measure
from fps_kernels.ops import backend_for
from fps_kernels.runs.models import timm_model
from fps_kernels.selection import Selection
from fps_kernels.selection.summary import summarised

WORTH_REPEATING = 5.0  # seconds


@dataclass(frozen=True)
class Settings:
    """What the demo does.

    Attributes:
        model: a timm architecture, or ``None`` for the model that ships with the package.
        checkpoint: its weights.
        data: a folder with ``train`` and ``test``, or ``None`` for digits.
        image_size: side of the images.
        k: entries tuned per output neuron.
        epochs: passes over the training images.
        batch_size: images a training step.
        seeds: repetitions.
        lr: peak learning rate of sparse choices.
        lr_all: peak learning rate of full tuning.
        lr_head: peak learning rate of head and biases alone.
        test_limit: measure on so many test images.
    """

    model: str | None = None
    checkpoint: Path | None = None
    data: Path | None = None
    image_size: int | None = None
    k: int = 4
    epochs: int = 30
    batch_size: int = 20
    seeds: int = 3
    lr: float = 1e-2
    lr_all: float = 1e-3
    lr_head: float = 1e-2
    test_limit: int | None = None


def load(settings: Settings) -> tuple[nn.Module, Task]:
    """The model and the task of the settings.

    Raises:
        ValueError: a model without data, or data without a model.
    """
    if (settings.model is None) != (settings.data is None):
        raise ValueError("--model and --data go together: one says what to tune, the other on what")
    if settings.model is None:
        return digits_vit(len(NEW_DIGITS)), digits(NEW_DIGITS, train_per_class=20)
    assert settings.data is not None
    if not settings.data.is_dir():
        raise ValueError(f"there is no folder {settings.data}")
    probe = timm_model(settings.model, settings.checkpoint, 2, settings.image_size)
    config: Any = probe.pretrained_cfg
    size = settings.image_size or config["input_size"][-1]
    task = image_folder(settings.data, size, config["mean"], config["std"], settings.test_limit)
    torch.manual_seed(0)
    return timm_model(settings.model, settings.checkpoint, task.classes, settings.image_size), task


def run(settings: Settings, console: Console | None = None) -> dict[str, list[Outcome]]:
    """Run the demo and print its tables.

    Args:
        settings: what to do.
        console: where to print.

    Returns:
        The outcomes of every way of tuning, one per seed.

    Raises:
        ValueError: settings that do not go together, or files that are missing.
    """
    console = console or Console()
    torch.manual_seed(0)
    model, task = load(settings)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"\n[bold]{settings.model or 'a small ViT, pretrained on the digits 0–4'}[/], {parameters:,} parameters, "
        f"tuned on [bold]{task.name}[/]: {task.classes} classes, {len(task.train)} training and {len(task.test)} test "
        f"images. Kernels: {backend_for('score_topk', 'cpu')}.\n"
    )
    # Shuffled: images lie in order of their classes, and GPS's contrastive loss compares those of a batch.
    batches = list(task.batches(task.train, 64, torch.Generator().manual_seed(0)))
    budget = PerNeuron(settings.k)
    chosen, costs = choices(model, batches, budget)
    _print_choice(console, chosen["FPS"])
    _print_costs(console, costs)
    outcomes = _compare(console, settings, model, task, chosen)
    _print_outcomes(console, settings, outcomes, accuracy(model, task))
    _print_steps(console, settings, model, task, chosen["FPS"])
    return outcomes


def choices(
    model: nn.Module, batches: list[Any], budget: PerNeuron
) -> tuple[dict[str, Selection], dict[str, tuple[MemoryReport[Selection], float]]]:
    """The selections that are compared, and what each cost: peak memory and seconds."""
    ways: dict[str, Callable[[], Selection]] = {
        "FPS, micro": lambda: select(model, batches, scorer=FPS(), budget=budget, micro_batch=4, progress=False),
        "FPS, whole": lambda: select(model, batches, scorer=FPS(), budget=budget, progress=False),
        "GPS, whole": lambda: gps_select(model, batches, views=random_views, budget=budget, progress=False),
        "GPS, micro": lambda: gps_select(model, batches, views=random_views, budget=budget, micro_batch=4, progress=False),
    }
    costs = {}
    for name, way in ways.items():
        start = time.perf_counter()
        report = measure(way, existing=[model])
        seconds = time.perf_counter() - start
        if seconds < WORTH_REPEATING:  # where the bookkeeping of memory weighs, time it again without
            start = time.perf_counter()
            way()
            seconds = time.perf_counter() - start
        costs[name] = report, seconds
    chosen = {name: costs[f"{name}, micro"][0].result for name in ("FPS", "GPS")}
    chosen["random"] = select(model, batches, scorer=Random(0), budget=budget, progress=False)
    return chosen, costs


def _compare(
    console: Console, settings: Settings, model: nn.Module, task: Task, chosen: dict[str, Selection]
) -> dict[str, list[Outcome]]:
    ways: dict[str, tuple[Selection | str, float]] = {
        "FPS": (chosen["FPS"], settings.lr),
        "GPS": (chosen["GPS"], settings.lr),
        "random": (chosen["random"], settings.lr),
        "head only": ("head", settings.lr_head),
        "head and biases": ("biases", settings.lr_head),
        "full tuning": ("all", settings.lr_all),
    }
    outcomes: dict[str, list[Outcome]] = {}
    steps = settings.epochs * -(-len(task.train) // settings.batch_size)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for name, (what, lr) in ways.items():
            advance = partial(progress.advance, progress.add_task(name, total=steps * settings.seeds))
            outcomes[name] = [
                tune(
                    model,
                    task,
                    what,
                    lr=lr,
                    epochs=settings.epochs,
                    batch_size=settings.batch_size,
                    seed=seed,
                    on_step=advance,
                )
                for seed in range(settings.seeds)
            ]
    return outcomes


def _print_choice(console: Console, selection: Selection) -> None:
    """One row per weight; for deep models one row per kind of weight."""
    table = Table(title="What FPS chose", title_justify="left")
    table.add_column("weight")
    for heading in ("layers", "shape", "chosen", "density", "columns used"):
        table.add_column(heading, justify="right")
    for row in summarised(selection):
        table.add_row(row.name, str(row.weights), row.shape, f"{row.chosen:,}", f"{row.density:.2%}", row.columns_text)
    console.print(table)
    console.print(f"{selection.nnz:,} entries, {selection.density:.2%} of the weights they were chosen from\n")


def _print_costs(console: Console, costs: dict[str, tuple[MemoryReport[Selection], float]]) -> None:
    least = costs["FPS, micro"][0]
    table = Table(title="What choosing costs: batches of 64, whole or in micro-batches of 4", title_justify="left")
    table.add_column("method")
    for heading in ("peak", "beside weights", "peak/FPS", "seconds"):
        table.add_column(heading, justify="right")
    for name, (report, seconds) in costs.items():
        table.add_row(
            name, format_bytes(report.peak), format_bytes(report.added), f"{report.peak / least.peak:.1f}×", f"{seconds:.2f}"
        )
    console.print(table)
    console.print()


def _print_outcomes(console: Console, settings: Settings, outcomes: dict[str, list[Outcome]], before: float) -> None:
    table = Table(
        title=f"What tuning gives ({settings.epochs} epochs, {settings.seeds} {'seeds' if settings.seeds > 1 else 'seed'})",
        title_justify="left",
    )
    table.add_column("tuned")
    for heading in ("trained", "accuracy", "seconds"):
        table.add_column(heading, justify="right")
    table.add_row("nothing (new head)", "0", f"{before:.1%}", "")
    for name, members in outcomes.items():
        values = [m.accuracy for m in members]
        spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
        seconds = statistics.mean(m.seconds for m in members)
        table.add_row(name, f"{members[0].trained:,}", f"{statistics.mean(values):.1%}{spread}", f"{seconds:.1f}")
    console.print(table)
    console.print("FPS, GPS and random train the head and the biases, too; ± is the standard deviation over seeds.\n")


def _print_steps(console: Console, settings: Settings, model: nn.Module, task: Task, chosen: Selection) -> None:
    ways: dict[str, tuple[Selection | str, int | None]] = {
        "full tuning": ("all", None),
        "full tuning, kept in 8 bits": ("all", 8),
        "FPS": (chosen, None),
        "FPS, kept in 8 bits": (chosen, 8),
    }
    peaks = {name: step_peak(model, task, what, settings.batch_size, bits) for name, (what, bits) in ways.items()}
    table = Table(title=f"What a training step needs, batches of {settings.batch_size}", title_justify="left")
    table.add_column("tuned")
    for heading in ("peak", "of full tuning"):
        table.add_column(heading, justify="right")
    for name, peak in peaks.items():
        table.add_row(name, format_bytes(peak), f"{peak / peaks['full tuning']:.2f}×")
    console.print(table)
    console.print("8 bits: what the forward pass keeps for the backward pass (fps.kept, or attach with keep_bits=8).\n")
