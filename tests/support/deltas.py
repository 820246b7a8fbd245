"""A base model and what was tuned of it."""

import copy

import torch
from torch import nn

import fps_kernels as fps
from tests.support.models import Classifier, images, labelled
from tests.support.training import RATES, train


def tuned(
    density: float = 0.1, dtype: torch.dtype = torch.float32, model: nn.Module | None = None
) -> tuple[nn.Module, fps.Tuner]:
    """A base model, and a tuner of a copy that was trained a little."""
    base = (model or Classifier()).to(dtype)
    twin = copy.deepcopy(base)
    tuner = fps.attach(twin, fps.select(twin, [images().to(dtype)], budget=fps.PerTensor(0.1)))
    train(twin, fps.MaskedAdamW(tuner, **RATES), [labelled() for _ in range(3)])
    return base, tuner


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
