"""How well a model does on images: accuracy, class by class, what it takes for what, and where it is most wrong."""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels.runs.images import ImageSet, Reading, in_order
from fps_kernels.runs.models import Loaded
from fps_kernels.runs.processes import Processes
from fps_kernels.runs.views import as_seen_by
from fps_kernels.storage.atomic import replaced_at_once

WORST = 24
_TOP = 5


@dataclass(frozen=True)
class Mistake:
    """An image that the model is wrong about.

    Attributes:
        image: its path, or its place in a data set.
        label: what it is.
        predicted: what the model takes it for.
        probability: that the model gives to that.
        loss: cross-entropy of its label.
    """

    image: str
    label: str
    predicted: str
    probability: float
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """What a model did on some images.

    Attributes:
        name: of the images.
        images: how many.
        loss: mean cross-entropy.
        accuracy: share whose label is the most probable class.
        top5: share whose label is among the five most probable; ``None`` for up to five classes.
        classes: their names.
        confusion: ``(label, predicted, images)`` wherever there is an image, in ascending order.
        worst: the mistakes with the highest loss, the worst first.
    """

    name: str
    images: int
    loss: float
    accuracy: float
    top5: float | None
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, int, int], ...]
    worst: tuple[Mistake, ...]

    def of_classes(self) -> list[dict[str, Any]]:
        """A row for each class: its name, images, recall and precision in [0, 1] (``None`` where there is no image)."""
        count = len(self.classes)
        right, labelled, predicted = [0] * count, [0] * count, [0] * count
        for label, guess, images in self.confusion:
            labelled[label] += images
            predicted[guess] += images
            right[label] += images if label == guess else 0
        return [
            {
                "class": name,
                "images": labelled[i],
                "recall": right[i] / labelled[i] if labelled[i] else None,
                "precision": right[i] / predicted[i] if predicted[i] else None,
            }
            for i, name in enumerate(self.classes)
        ]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        with replaced_at_once(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: it is another file.
            OSError: it cannot be read.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            worst = tuple(Mistake(**mistake) for mistake in found["worst"])
            confusion = tuple((int(a), int(b), int(n)) for a, b, n in found["confusion"])
            return cls(**{**found, "classes": tuple(found["classes"]), "confusion": confusion, "worst": worst})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no evaluation: {error!r}") from error


@dataclass(frozen=True)
class Seen:
    """What a model says of images, in their order.

    Attributes:
        places: of the images.
        logits: ``[B, classes]`` float32.
        target: ``[B]`` int64.
    """

    places: Sequence[int]
    logits: Tensor
    target: Tensor


@torch.no_grad()
def seen_by(
    loaded: Loaded,
    images: ImageSet,
    reading: Reading,
    batch_size: int,
    processes: Processes | None = None,
    precision: AbstractContextManager[Any] | None = None,
) -> Iterator[Seen]:
    """What a model in evaluation mode says of each image of this process.

    Raises:
        UnreadableImageError: an image that cannot be read.
    """
    processes = processes or Processes()
    loaded.model.eval()
    places = list(in_order(len(images), batch_size)())
    parts = list(processes.parts(places))
    read = reading.batches(images, as_seen_by(loaded.config), lambda: iter(parts), 0)
    for batch, part, (inputs, target) in zip(places, parts, read, strict=True):
        if not processes.share(len(batch)):
            continue
        with precision or nullcontext():
            logits = loaded.model(inputs.to(loaded.device, loaded.dtype)).float()
        yield Seen([i for _, i in part], logits, target.to(loaded.device))


@torch.no_grad()
def evaluate(
    loaded: Loaded,
    images: ImageSet,
    reading: Reading,
    batch_size: int,
    processes: Processes | None = None,
    precision: AbstractContextManager[Any] | None = None,
) -> Evaluation:
    """Measure a model on images.

    Args:
        loaded: the model; it is in evaluation mode afterwards.
        images: with labels.
        reading: how they are read.
        batch_size: images in a forward pass.
        processes: those that take part; all of them get the same result.
        precision: what forward passes are run inside of, such as ``torch.autocast``.

    Raises:
        UnreadableImageError: an image that cannot be read.
    """
    processes = processes or Processes()
    count = len(images.classes)
    loss = torch.zeros((), dtype=torch.float64, device=loaded.device)
    among = torch.zeros((), dtype=torch.int64, device=loaded.device)
    confusion = torch.zeros(count * count, dtype=torch.int64, device=loaded.device)
    mistakes: list[tuple[float, int, int, int, float]] = []
    for seen in seen_by(loaded, images, reading, batch_size, processes, precision):
        losses = F.cross_entropy(seen.logits, seen.target, reduction="none")
        loss += losses.double().sum()
        guess = seen.logits.argmax(1)
        if count > _TOP:
            among += (seen.logits.topk(_TOP, 1).indices == seen.target[:, None]).any(1).sum()
        confusion += torch.bincount(seen.target * count + guess, minlength=count * count)
        probability = seen.logits.softmax(1).amax(1)
        rows = zip(losses.tolist(), seen.places, seen.target.tolist(), guess.tolist(), probability.tolist(), strict=True)
        mistakes = sorted([*mistakes, *(row for row in rows if row[2] != row[3])], key=lambda row: (-row[0], row[1]))[:WORST]
    summed, in_five = processes.total(torch.stack([loss, among.double()])).tolist()
    confusion = processes.total(confusion).view(count, count)
    mistakes = _of_all(mistakes, processes)
    cells = [(a, b, int(confusion[a, b])) for a, b in confusion.nonzero().tolist()]
    names = images.classes
    return Evaluation(
        name=images.name,
        images=len(images),
        loss=summed / len(images),
        accuracy=int(confusion.diagonal().sum()) / len(images),
        top5=in_five / len(images) if count > _TOP else None,
        classes=names,
        confusion=tuple(cells),
        worst=tuple(Mistake(images.place(i), names[a], names[b], p, value) for value, i, a, b, p in mistakes),
    )


def _of_all(
    mistakes: list[tuple[float, int, int, int, float]], processes: Processes
) -> list[tuple[float, int, int, int, float]]:
    if processes.size == 1:
        return mistakes
    own = torch.full((WORST, 5), -1.0, dtype=torch.float64)
    if mistakes:
        own[: len(mistakes)] = torch.tensor(mistakes, dtype=torch.float64)
    rows = torch.cat(processes.collected(own.flatten())).view(-1, 5).tolist()
    found = [(value, int(i), int(a), int(b), p) for value, i, a, b, p in rows if i >= 0]
    return sorted(found, key=lambda row: (-row[0], row[1]))[:WORST]
