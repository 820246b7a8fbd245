"""How a run trains, and what may differ between the parts of one run."""

import math
from dataclasses import dataclass

import torch

from fps_kernels.runs.views import Augmentation

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """How to train: what the tuned weights depend on beside the model, the data and the selection.

    Attributes:
        epochs: times each image is seen.
        batch_size: images in a forward pass.
        accumulate: forward passes in a step.
        lr: peak learning rate of the chosen entries, of biases and of norms.
        lr_head: of the classifier, which starts from nothing.
        weight_decay: of the tuned entries.
        warmup: share of the steps in which the rate rises.
        schedule: what the rate does after that, of :data:`SCHEDULES`.
        label_smoothing: of the cross-entropy.
        clip_grad: largest norm of the gradients.
        autocast: ``bf16`` or ``fp16``: what is multiplied in; ``None``: the weights' dtype.
        augment: what is done to an image at random, see :class:`Augmentation`; likewise the next four.
        crop_scale: smallest share of an image in a crop.
        auto_augment: a policy of timm's.
        color_jitter: its strength.
        erase: chance that a rectangle is erased.
        mixup: alpha of the mixing of two images (Zhang et al., ICLR 2018); 0 for none.
        cutmix: alpha of the rectangle that comes from another image (Yun et al., ICCV 2019); 0 for none.
        class_weights: of each class in the loss; ``None``: all alike.
        ema: decay of the running average of what is trained, which is then what is measured and written; 0 for none.
        keep: ``last`` or ``best``: which epoch is written.
        patience: evaluations without a better one after which training ends; ``None``: never.
        grad_checkpointing: compute blocks again in the backward pass, instead of keeping what they gave.
        keep_bits: keep what the backward pass needs in so many bits; ``None``: as it is.
        seed: of all that is drawn.
    """

    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    lr_head: float
    weight_decay: float
    warmup: float
    schedule: str
    label_smoothing: float
    clip_grad: float | None
    autocast: str | None
    augment: str
    crop_scale: float
    auto_augment: str | None
    color_jitter: float
    erase: float
    mixup: float
    cutmix: float
    class_weights: tuple[float, ...] | None
    ema: float
    keep: str
    patience: int | None
    grad_checkpointing: bool
    keep_bits: int | None
    seed: int

    def rate(self, step: int, steps: int) -> float:
        """Share of the peak learning rate: rises in equal steps over the warm-up, then stays or falls to 0 as a cosine."""
        rising = round(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    def precision(self, device: torch.device) -> torch.autocast:
        """What forward passes are run inside of."""
        dtype = torch.float16 if self.autocast == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype, enabled=self.autocast is not None)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """What keeps float16 gradients from vanishing; it does nothing where nothing is multiplied in float16."""
        return torch.amp.GradScaler(device.type, enabled=self.autocast == "fp16")

    @property
    def augmentation(self) -> Augmentation:
        """Of training images."""
        return Augmentation(self.augment, self.crop_scale, self.auto_augment, self.color_jitter, self.erase)


RATES = ((8, 1e-3), (32, 3e-4), (math.inf, 1e-4))
"""Learning rates of the chosen entries, of biases and of norms, by how many of them each output neuron has: where the loss
on held-out images was lowest on two data sets at 1, 4, 16 and 64, with the head at 3e-3 (docs/measurements.md, learning
rates of FPS by budget)."""


def usual_rate(entries_per_neuron: float) -> float:
    """The learning rate for a budget, see :data:`RATES`.

    Args:
        entries_per_neuron: in the mean over the output neurons.
    """
    return next(rate for most, rate in RATES if entries_per_neuron <= most)


@dataclass(frozen=True)
class Habits:
    """What may differ between the parts of one run: how often it is saved, looked at and told of."""

    save_minutes: float
    save_steps: int | None
    log_steps: int
    eval_epochs: int
