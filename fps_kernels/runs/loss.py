"""The loss of a step: cross-entropy, with mixed images, classes that count more, and smoothed labels."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from fps_kernels.runs.images import ImageSet, mixed, seeded
from fps_kernels.runs.recipe import Recipe


@dataclass(frozen=True)
class Loss:
    """What is minimised.

    Attributes:
        classes: outputs of the model.
        label_smoothing: share of a label that is spread over all classes.
        mixup: alpha of mixing, 0 for none.
        cutmix: alpha of rectangles, 0 for none; with both, each batch draws one of the two.
        class_weights: ``[classes]``, or ``None``.
        seed: of what is drawn.
    """

    classes: int
    label_smoothing: float
    mixup: float
    cutmix: float
    class_weights: Tensor | None
    seed: int

    @classmethod
    def of(cls, recipe: Recipe, classes: int, device: torch.device) -> "Loss":
        """That of a recipe."""
        weights = recipe.class_weights
        held = None if weights is None else torch.tensor(weights, device=device)
        return cls(classes, recipe.label_smoothing, recipe.mixup, recipe.cutmix, held, recipe.seed)

    def mix(self, inputs: Tensor, target: Tensor, *place: int) -> tuple[Tensor, Tensor]:
        """Images mixed with others of their batch, and shares of classes ``[B, classes]``; as they are where nothing mixes.

        Args:
            inputs: ``[B, C, H, W]``.
            target: ``[B]`` int64.
            place: step and batch; what is drawn is a function of them and of the seed.
        """
        ways = [(v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)]
        ways = [(way, alpha) for way, alpha in ways if alpha > 0]
        if not ways:
            return inputs, target
        with seeded(mixed(self.seed, *place, -3)):
            way, alpha = ways[int(torch.randint(len(ways), ()))]
            images, shares = way(alpha=alpha, num_classes=self.classes)(inputs, target)
        return images, shares

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Summed over the images."""
        return F.cross_entropy(
            logits.float(), target, weight=self.class_weights, reduction="sum", label_smoothing=self.label_smoothing
        )


def class_weights_of(wanted: str | None, images: ImageSet) -> tuple[float, ...] | None:
    """What each class counts in the loss.

    Args:
        wanted: ``balanced``, a JSON file that maps each class to a number, or ``None``.
        images: to train on.

    Raises:
        ValueError: a class without an image or a number, an unknown class, or a number that is not positive.
    """
    if wanted is None:
        return None
    if wanted == "balanced":
        labels = images.labels()
        if labels is None:
            raise ValueError(f"--class-weights balanced: {images.name} does not tell its labels")
        return balanced(labels, images.classes)
    try:
        given = json.loads(Path(wanted).read_text(encoding="utf-8"))
        weights = tuple(float(given[name]) for name in images.classes)
    except KeyError as error:
        raise ValueError(f"--class-weights {wanted} has no number for the class {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"--class-weights {wanted} must map each class to a number, as JSON: {error}") from error
    if unknown := sorted(set(given) - set(images.classes)):
        raise ValueError(f"--class-weights {wanted} has the class {unknown[0]!r}, which {images.name} lacks")
    if not all(0 < w < float("inf") for w in weights):
        raise ValueError(f"--class-weights {wanted}: numbers must be positive, got {min(weights)}")
    return weights


def balanced(labels: list[int], classes: tuple[str, ...]) -> tuple[float, ...]:
    """Weights by which each class counts alike, 1 in the mean over the images: ``N / (classes · N_c)``.

    Raises:
        ValueError: a class has no image.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=len(classes))
    if (counts == 0).any():
        raise ValueError(f"--class-weights balanced: the class {classes[int(counts.argmin())]} has no training image")
    return tuple((len(labels) / (len(classes) * counts.double())).tolist())
