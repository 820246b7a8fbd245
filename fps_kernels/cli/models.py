"""The model that a command works on, and how it wants its images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from fps_kernels.cli.output import warn
from fps_kernels.demo.models import timm_model


@dataclass(frozen=True)
class Loaded:
    """A model and what goes into it.

    Attributes:
        model: on its device, in its dtype.
        config: timm's data configuration: ``input_size``, ``mean``, ``std``, ``interpolation``, ...
        device: where it lies.
        dtype: of its parameters.
    """

    model: nn.Module
    config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def mode(self) -> str:
        """PIL's mode of its images."""
        return "L" if self.config["input_size"][0] == 1 else "RGB"


def load_model(
    name: str,
    *,
    checkpoint: Path | None,
    pretrained: bool,
    classes: int,
    image_size: int | None,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    drop_path: float = 0.0,
) -> Loaded:
    """A timm model; its new head, and all of it where there is no checkpoint, is drawn by the seed.

    Raises:
        ValueError: see :func:`fps_kernels.demo.models.timm_model`; both of ``checkpoint`` and ``pretrained``; or images of a
            size that the model cannot take.
    """
    if checkpoint is not None and pretrained:
        raise ValueError("give --checkpoint or --pretrained, not both")
    torch.manual_seed(seed)
    model = timm_model(name, checkpoint, classes, image_size, pretrained=pretrained, drop_path=drop_path)
    if checkpoint is None and not pretrained:
        warn(f"{name} has random weights: --checkpoint FILE or --pretrained gives it others")
    config: dict[str, Any] = dict(resolve_model_data_config(model))
    if image_size is not None:
        config |= {"input_size": (config["input_size"][0], image_size, image_size)}
    loaded = Loaded(model.to(device, dtype), config, device, dtype)
    _try(name, loaded)
    return loaded


@torch.no_grad()
def _try(name: str, loaded: Loaded) -> None:
    """One empty image, so that a size that does not fit is found before any work."""
    training = loaded.model.training
    try:
        loaded.model.eval()(torch.zeros(1, *loaded.config["input_size"], device=loaded.device, dtype=loaded.dtype))
    except (AssertionError, RuntimeError) as error:
        side = loaded.config["input_size"][-1]
        raise ValueError(f"{name} cannot take images of {side}×{side} (--image-size): {error}") from error
    finally:
        loaded.model.train(training)
