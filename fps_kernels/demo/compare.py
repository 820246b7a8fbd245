"""Tuning one task in the ways that the demo compares."""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fps_kernels.demo.data import Task
from fps_kernels.keeping.kept import kept
from fps_kernels.memory import measure
from fps_kernels.selection import Selection
from fps_kernels.tuning.attaching import attach
from fps_kernels.tuning.masked_adamw import MaskedAdamW
from fps_kernels.weights.roles import classifier_modules


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, batch_size: int = 250) -> float:
    """Share of the test images that are classified correctly."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in task.batches(task.test, batch_size))
    return right / len(task.test)


@dataclass(frozen=True)
class Outcome:
    """What tuning gave.

    Attributes:
        accuracy: on the test images, in [0, 1].
        trained: number of parameters or entries that were trained.
        seconds: wall time of the training.
    """

    accuracy: float
    trained: int
    seconds: float


def tune(
    model: nn.Module,
    task: Task,
    what: Selection | str,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Outcome:
    """Tune a copy of a model and measure it.

    Args:
        model: starting point; it is not changed.
        task: data.
        what: a selection; or ``"head"``, ``"biases"`` (and head), ``"all"``, which train whole parameters.
        lr: peak of a warm-up over a fifth of the steps and a cosine after it.
        epochs: passes over the training images.
        batch_size: images a step.
        seed: of the order of the images.
        on_step: called after each step.
    """
    model = copy.deepcopy(model).train()
    params = attach(model, what) if isinstance(what, Selection) else _whole(model, what)
    optimizer = MaskedAdamW(params, lr=lr, weight_decay=1e-4)
    trained = sum(entries.nnz for entries in optimizer.selections().values())
    total = epochs * -(-len(task.train) // batch_size)
    # Without a warm-up the first steps, which Adam makes full-sized, undo much of what the weights knew.
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(2, total), pct_start=0.2, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in range(epochs):
        for images, target in task.batches(task.train, batch_size, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
            rates.step()
            on_step()
    return Outcome(accuracy(model, task), trained, time.perf_counter() - start)


def step_peak(model: nn.Module, task: Task, what: Selection | str, batch_size: int, keep_bits: int | None = None) -> int:
    """Peak bytes of a training step that has the optimizer's state, model and all, for a copy of the model.

    Args:
        model: it is not changed.
        task: data.
        what: as for :func:`tune`.
        batch_size: images a step.
        keep_bits: 8 keeps what backward needs in so many bits.
    """
    model = copy.deepcopy(model).train()
    params = attach(model, what) if isinstance(what, Selection) else _whole(model, what)
    optimizer = MaskedAdamW(params)
    images, target = next(iter(task.batches(task.train, batch_size, torch.Generator().manual_seed(0))))

    def steps() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            with kept(keep_bits) if keep_bits is not None else nullcontext():
                loss = F.cross_entropy(model(images), target)
            loss.backward()
            optimizer.step()

    return measure(steps, existing=[model, images, target]).peak


def _whole(model: nn.Module, what: str) -> list[nn.Parameter]:
    """The parameters that are trained whole; the others are frozen."""
    heads = tuple(f"{name}." for name in classifier_modules(model))
    for name, p in model.named_parameters():
        p.requires_grad_(what == "all" or name.startswith(heads) or (what == "biases" and name.endswith("bias")))
    return [p for p in model.parameters() if p.requires_grad]
