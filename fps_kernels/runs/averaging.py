"""A running average of what is trained: of a selection it takes as little memory as the chosen entries."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fps_kernels.tuning.tuner import Tuner


class Average:
    """Exponential moving average (Polyak & Juditsky 1992) of a tuner's numbers, float32.

    In its first steps it forgets faster, ``min(decay, (1 + t) / (10 + t))``, so that it is not held back by where training
    began.

    Args:
        tuner: of the model.
        decay: in (0, 1).
    """

    def __init__(self, tuner: Tuner, decay: float) -> None:
        self.tuner, self.decay = tuner, decay
        self.held = {name: p.detach().float().clone() for name, p in tuner.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in what a step made, the first of which is step 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, p in self.tuner.named_parameters():
            self.held[name].lerp_(p.detach().float(), share)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the model has the average; afterwards every bit is what it was."""
        before = values_of(self.tuner)
        show(self.tuner, self.held)
        try:
            yield
        finally:
            show(self.tuner, before)


def values_of(tuner: Tuner) -> dict[str, Tensor]:
    """A copy of everything that is trained, by name."""
    return {name: p.detach().clone() for name, p in tuner.named_parameters()}


@torch.no_grad()
def show(tuner: Tuner, values: dict[str, Tensor]) -> None:
    """Let the model have other values."""
    tuner.load_state_dict({name: values[name] for name in tuner.compact})
    for name, p in tuner.dense.items():
        p.copy_(values[name])
