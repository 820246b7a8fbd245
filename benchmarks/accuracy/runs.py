"""One run of ``benchmarks.accuracy``: a method tunes a model on some images, and others say how well it did."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.lines import to_bits
from benchmarks.accuracy.methods import METHODS, Occasion, folder_images
from benchmarks.shared import methods
from fps_kernels.demo.data import Split, Task, image_folder
from fps_kernels.runs.models import timm_model
from fps_kernels.selection import Selection


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Attributes:
        model: timm's name.
        checkpoint: its weights; ``None`` for random ones.
        image_size: side of the images.
        epochs: passes over the training images.
        batch_size: images a step.
        anchor: folder of images like those of the pre-training.
    """

    model: str
    checkpoint: Path | None
    image_size: int
    epochs: int
    batch_size: int = 20
    anchor: Path | None = None


def held_out(task: Task, seed: int, share: float) -> Task:
    """A task whose test images are a stratified share of its training images; no test image is seen.

    Args:
        task: with its true test images, which are left out.
        seed: of the split.
        share: of each class, at least one image and at most all but one.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    train, validation = [], []
    for label in range(task.classes):
        members = (task.train.target == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        validation.append(members[:count])
        train.append(members[count:])
    parts = [torch.cat(indices).sort().values for indices in (train, validation)]
    splits = [Split(task.train.images[i], task.train.target[i]) for i in parts]
    return Task(task.name, task.classes, splits[0], splits[1], task.mean, task.std)


class Workshop:
    """Loads models and images once, and keeps what was found about them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._tasks: dict[Path, Task] = {}
        self._known: dict[tuple[str, float | None, int], dict[Any, Any]] = {}
        self._anchor: Tensor | None = None

    def model(self, classes: int, seed: int) -> nn.Module:
        """The pretrained model with a head drawn from ``seed``."""
        torch.manual_seed(seed)
        return timm_model(self.settings.model, self.settings.checkpoint, classes, self.settings.image_size)

    def task(self, directory: Path) -> Task:
        """All images of a data set."""
        if directory not in self._tasks:
            config: Any = self.model(2, 0).pretrained_cfg
            self._tasks[directory] = image_folder(directory, self.settings.image_size, config["mean"], config["std"])
        return self._tasks[directory]

    def occasion(self, directory: Path, k: int, seed: int, share: float | None = None) -> Occasion:
        """What a method may look at; with a ``share``, that much of the training images (by ``seed``) is for testing."""
        task = self.task(directory)
        if self._anchor is None and self.settings.anchor is not None:
            self._anchor = folder_images(self.settings.anchor, self.settings.image_size)
        known = self._known.setdefault((task.name, share, seed if share else 0), {})
        model = self.model(task.classes, seed)
        return Occasion(model, task if share is None else held_out(task, seed, share), k, seed, self._anchor, known)


def run(method: str, occasion: Occasion, lr: float, epochs: int, batch_size: int) -> dict[str, Any]:
    """Tune and measure.

    Args:
        method: a name of :data:`~benchmarks.accuracy.methods.METHODS`.
        occasion: the model, which is left as it is, and the task.
        lr: peak of a warm-up over a fifth of the steps and a cosine after it.
        epochs: passes over the training images.
        batch_size: images a step.

    Returns:
        Counts, accuracy in [0, 1], mean losses, seconds, a bit for every test image, and what the update looks like.
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(occasion.seed)
    contestant = METHODS[method].make(methods.fresh(occasion.model), occasion, lr)
    chosen_after = time.process_time() - start_cpu
    if method == "linear":
        train_loss, right, losses = _linear(contestant, occasion, epochs, batch_size)
    else:
        train_loss = _train(
            contestant, _shuffled(occasion, epochs, batch_size), epochs, len(occasion.task.train), batch_size
        )
        with contestant.keeping:
            right, losses = _measure(contestant.model, occasion.task.batches(occasion.task.test, 100))
    trained = contestant.trained
    before = {name: p.detach() for name, p in occasion.model.named_parameters()}
    after = methods.weights(contestant)
    summary = {} if method in ("linear", "biases+head") else update_summary(before, after)
    if contestant.selection is not None:
        summary["unmoved"] = unmoved(contestant.selection, before, after)
    return {
        "trained": trained,
        "correct": int(right.sum()),
        "total": len(right),
        "accuracy": round(float(right.float().mean()), 6),
        "loss": round(float(losses.mean()), 5),
        "train_loss": round(train_loss, 5),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - start_cpu, 1),
        "choice_cpu_seconds": round(chosen_after, 1),
        "update": summary,
        "bits": to_bits(right),
    }


def _shuffled(o: Occasion, epochs: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(o.seed)  # the same order for every method: runs are compared in pairs
    for _ in range(epochs):
        yield from o.task.batches(o.task.train, batch_size, generator)


def _train(
    contestant: methods.Contestant, batches: Iterator[tuple[Tensor, Tensor]], epochs: int, images: int, batch_size: int
) -> float:
    """Mean loss over the last pass."""
    contestant.model.train()
    steps_per_epoch = -(-images // batch_size)
    peaks = [group["lr"] for group in contestant.optimizer.param_groups]
    rates = torch.optim.lr_scheduler.OneCycleLR(
        contestant.optimizer, peaks, max(2, epochs * steps_per_epoch), pct_start=0.2, cycle_momentum=False
    )
    losses = []
    for x, y in batches:
        losses.append(contestant.step(x, y))
        rates.step()
    last = losses[-steps_per_epoch:]
    return sum(last) / len(last)


@torch.no_grad()
def _measure(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Whether each image is classified correctly, and its cross-entropy."""
    model.eval()
    pairs = [(model(x).float(), y) for x, y in batches]
    logits, target = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return logits.argmax(1) == target, F.cross_entropy(logits, target, reduction="none")


def _linear(contestant: methods.Contestant, o: Occasion, epochs: int, batch_size: int) -> tuple[float, Tensor, Tensor]:
    """The head alone, on features computed once; it is cheap, so it gets ten times the passes."""

    @torch.no_grad()
    def features(split: Split) -> tuple[Tensor, Tensor]:
        model = o.model.eval()
        pairs = [(model.forward_head(model.forward_features(x), pre_logits=True), y) for x, y in o.task.batches(split, 100)]
        f, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return f, y

    x, y = o.remember("features", lambda: features(o.task.train))
    test = o.remember("test features", lambda: features(o.task.test))
    head = contestant.model.get_classifier()
    probe = methods.Contestant(head, contestant.optimizer)
    generator = torch.Generator().manual_seed(o.seed)
    epochs *= 10
    order = (i for _ in range(epochs) for i in torch.randperm(len(x), generator=generator).split(batch_size))
    loss = _train(probe, ((x[i], y[i]) for i in order), epochs, len(x), batch_size)
    right, losses = _measure(head, iter([test]))
    return loss, right, losses


def fit_head(o: Occasion, lr: float = 1e-3, epochs: int = 4, batch_size: int = 20) -> nn.Module:
    """A copy of the model whose head was fitted to the training images, everything else as it was."""
    contestant = methods.head_only(methods.fresh(o.model), lr)
    _linear(contestant, o, epochs, batch_size)
    return contestant.model


def unmoved(selection: Selection, before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Share of the chosen entries of which a model shows, in its own dtype, what it showed before it was tuned."""
    same = [(after[name] == before[name].to(after[name].dtype))[chosen.mask()] for name, chosen in selection.items()]
    return round(float(torch.cat(same).float().mean()), 5)


def update_summary(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """What the change of the matrices looks like, means over the weights of the blocks that changed.

    Returns:
        ``effective_rank``: exp of the entropy of the squared singular values (Roy & Vetterli 2007);
        ``columns``: share of the columns that changed; ``rank_share``: effective rank over the smaller side;
        ``largest_column``: share of the squared change in the column that changed most;
        ``relative_norm``: Frobenius norm of all changes over that of the same weights.
    """
    ranks, shares, columns, largest, squared, total = [], [], [], [], 0.0, 0.0
    for name, new in after.items():
        if not name.startswith("blocks.") or name not in before:
            continue
        change = (new.float() - before[name].to(new.dtype).float()).flatten(1).double()
        energy = change.square().sum(0)
        if not energy.sum() > 0:
            continue
        side = change if change.shape[0] < change.shape[1] else change.t()
        spectrum = torch.linalg.eigvalsh(side @ side.t()).clamp(min=0)
        p = spectrum / spectrum.sum()
        ranks.append(float(torch.exp(-(p * p.clamp(min=1e-30).log()).sum())))
        shares.append(ranks[-1] / len(spectrum))
        columns.append(float((energy > 0).double().mean()))
        largest.append(float(energy.max() / energy.sum()))
        squared += float(energy.sum())
        total += float(before[name].double().square().sum())
    if not ranks:
        return {}
    means = {"effective_rank": ranks, "rank_share": shares, "columns": columns, "largest_column": largest}
    result = {key: sum(values) / len(values) for key, values in means.items()}
    return {key: round(value, 5) for key, value in {**result, "relative_norm": (squared / total) ** 0.5}.items()}
