"""What ``benchmarks.accuracy`` compares: every method as a choice of entries or as another way of tuning, with its rates."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.accuracy import ideas
from benchmarks.accuracy.coarse import coarse
from benchmarks.accuracy.lines import COARSER, FEWER_BITS
from benchmarks.shared import methods
from fps_kernels.choosing.gps import random_views
from fps_kernels.demo.data import Task
from fps_kernels.selection import Selection

# The head starts from nothing and is trained by every method alike, so it learns at one rate for all of them.
HEAD_LR = 3e-3
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def folder_images(directory: Path, size: int) -> Tensor:
    """All images under a folder, ``[N, 3, size, size]`` uint8."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import resize

    files = sorted(p for p in directory.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise ValueError(f"{directory} holds no .jpg or .png image: give another folder as --anchor")
    return torch.stack([resize(decode_image(str(f), ImageReadMode.RGB), [size, size], antialias=True) for f in files])


@dataclass
class Occasion:
    """What a method may look at: a model as it was pretrained, and the images it may be tuned on.

    Attributes:
        model: with a new head; it is not changed.
        task: its ``train`` split is all that may be looked at.
        k: entries per output neuron.
        seed: of everything that is drawn.
        anchor: images like those of the pre-training, uint8 ``[N, 3, H, W]``.
        known: statistics and choices found before with the same pretrained weights and images, by name.
    """

    model: nn.Module
    task: Task
    k: int
    seed: int
    anchor: Tensor | None = None
    known: dict[Any, Any] = field(default_factory=dict)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The training images in batches of 64, shuffled: a contrastive loss needs several classes in each."""
        return list(self.task.batches(self.task.train, 64, torch.Generator().manual_seed(self.seed)))

    def remember(self, key: Any, find: Callable[[], Any]) -> Any:
        """``find()``, unless it is known."""
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]

    def stats(self, ord: float) -> fps.ActivationStats:
        """Statistics of the training images; the order of the images does not matter to them."""
        return self.remember(("stats", ord), lambda: fps.calibrate(self.model, self.batches(), ord=ord, progress=False))

    def anchor_stats(self) -> fps.ActivationStats:
        """Statistics (``ord=1``) of the anchor.

        Raises:
            ValueError: no anchor was given.
        """
        if self.anchor is None:
            raise ValueError("GD-FPS compares with images like those of the pre-training: give their folder as --anchor")
        images = self.anchor
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.task.mean, self.task.std))
        batches = [(part.float() / 255 - mean) / std for part in images.split(64)]
        return self.remember("anchor", lambda: fps.calibrate(self.model, batches, progress=False))


Choice = Callable[[Occasion], Selection]


def _by(scorer: Callable[[Occasion], Any], ord: float, o: Occasion) -> Selection:
    return fps.select(o.model, stats=o.stats(ord), scorer=scorer(o), budget=fps.PerNeuron(o.k), progress=False)


def _gps(o: Occasion) -> Selection:
    def find() -> Selection:
        torch.manual_seed(o.seed)  # of the views
        return fps.gps_select(o.model, o.batches(), views=random_views, budget=fps.PerNeuron(o.k), progress=False)

    return o.remember(("GPS", o.k, o.seed), find)


CHOICES: dict[str, Choice] = {
    "random": partial(_by, lambda o: fps.Random(o.seed), 1),
    "FPS": partial(_by, lambda o: fps.FPS(), 1),
    "GPS": _gps,
    "GD-FPS": partial(_by, lambda o: fps.GrowthDriven(o.anchor_stats()), 1),
    "magnitude": partial(_by, lambda o: fps.Magnitude(), 1),
    "Wanda": partial(_by, lambda o: fps.Wanda(), 2),
    **ideas.IDEAS,
    "GPS, rising by rows": partial(ideas.rising_by_rows, _gps),
}


@dataclass(frozen=True)
class Method:
    """A way of tuning.

    Attributes:
        make: ``make(model, occasion, lr)`` gives the model and the optimizer.
        start: peak learning rate at which the search begins.
        per_k: whether the budget changes it.
        rates: peak learning rates to search among, ascending.
        like: another method whose rate is taken, instead of a search.
    """

    make: Callable[[nn.Module, Occasion, float], methods.Contestant]
    start: float
    per_k: bool
    rates: tuple[float, ...] = RATES
    like: str | None = None


def _sparse(choice: Choice, model: nn.Module, o: Occasion, lr: float, keep_bits: int | None = None) -> methods.Contestant:
    return methods.attached(model, choice(o), lr, HEAD_LR, keep_bits)


def _bfloat16_weights(model: nn.Module, o: Occasion, lr: float) -> methods.Contestant:
    """The choice of float32, so that the difference is that of training; master values are float32."""
    return _sparse(CHOICES["FPS"], methods.in_bfloat16(model), o, lr)


def _lora(model: nn.Module, o: Occasion, lr: float) -> methods.Contestant:
    return methods.lora(model, 8, lr, HEAD_LR)


def _like_selection(name: str, model: nn.Module, o: Occasion, lr: float) -> methods.Contestant:
    rank, density = methods.budget_of_peft(CHOICES["random"](o))
    if name == "shira":
        return methods.shira(model, rank, lr, HEAD_LR, o.seed)
    return methods.supertuning(model, density, lr, HEAD_LR)


METHODS: dict[str, Method] = {
    **{name: Method(partial(_sparse, choice), 1e-3, True) for name, choice in CHOICES.items()},
    "biases+head": Method(lambda m, o, lr: methods.biases_and_head(m, lr, HEAD_LR), 3e-3, False),
    "LoRA r=8": Method(_lora, 1e-3, False),
    "full": Method(lambda m, o, lr: methods.full(m, lr, HEAD_LR), 1e-4, False),
    "linear": Method(lambda m, o, lr: methods.head_only(m, lr), 1e-3, False),
    "PEFT SHiRA": Method(partial(_like_selection, "shira"), 1e-3, True),
    "PEFT Supertuning": Method(partial(_like_selection, "supertuning"), 1e-3, True),
    # At the rates that were found for 32 bits: the difference is that of the bits alone.
    "FPS, 8 bits": Method(partial(_sparse, CHOICES["FPS"], keep_bits=8), 1e-3, True, like=FEWER_BITS["FPS, 8 bits"]),
    "LoRA r=8, 8 bits": Method(
        lambda m, o, lr: methods.in_8_bits(_lora(m, o, lr)), 1e-3, False, like=FEWER_BITS["LoRA r=8, 8 bits"]
    ),
    "FPS, GELU in 4 bits": Method(
        coarse(partial(_sparse, CHOICES["FPS"], keep_bits=8)), 1e-3, True, like=FEWER_BITS["FPS, GELU in 4 bits"]
    ),
    "FPS, bfloat16 weights": Method(_bfloat16_weights, 1e-3, True, like=COARSER["FPS, bfloat16 weights"]),
    "FPS, bfloat16 products": Method(
        lambda m, o, lr: methods.autocast(_sparse(CHOICES["FPS"], m, o, lr)),
        1e-3,
        True,
        like=COARSER["FPS, bfloat16 products"],
    ),
}

# In the order in which they are run: what the comparison is about comes first.
STANDARD = (
    "random", "FPS", "GPS", "GD-FPS", "magnitude", "biases+head", "linear", "full", "LoRA r=8",
    "Wanda", "PEFT SHiRA", "PEFT Supertuning",
)  # fmt: skip
