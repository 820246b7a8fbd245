"""The models that are tried, by library. Each is made where it is needed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.coverage import diffusers_zoo, transformers_zoo
from benchmarks.coverage.checks import Sample
from benchmarks.coverage.names import names

Zoo = dict[str, Callable[[], Sample]]

VIDEO = ("mc3_18", "mvit_v1_b", "mvit_v2_s", "r2plus1d_18", "r3d_18", "swin3d_t")
SIDES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_32": 224}  # where 64 pixels will not do


def _timm(name: str) -> Sample:
    import timm

    for options in ({"img_size": 64}, {}):
        try:
            model = timm.create_model(name, num_classes=10, **options)
        except (TypeError, AssertionError, ValueError, RuntimeError):
            continue  # of one size only
        for side in (64, model.pretrained_cfg["input_size"][-1]):
            images = torch.randn(2, 3, side, side)
            try:
                with torch.no_grad():
                    model.eval()(images)
            except (AssertionError, RuntimeError):
                continue  # too small for it
            return Sample(model, images)
    raise ValueError(f"timm cannot make {name}")


def _torchvision(name: str) -> Sample:
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if "resnet50" in name and name.startswith("fcn") or "deeplab" in name or "lraspp" in name:
        options["weights_backbone"] = None
    model = torchvision.models.get_model(name, **options)
    side = SIDES.get(name, 64)
    if name.startswith("mvit"):
        return Sample(model, torch.randn(1, 3, 16, 224, 224))
    return Sample(model, torch.randn(2, 3, 16, side, side) if name in VIDEO else torch.randn(2, 3, side, side))


class _Pair(nn.Module):
    """A model of images and texts, without what reduces several processes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> Any:
        return self.model(image, text)


def _open_clip(name: str) -> Sample:
    import open_clip

    model = open_clip.create_model(name)
    side = model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size
    texts = torch.randint(1, 400, (2, 76 if name.startswith("coca") else 77))
    return Sample(_Pair(model), {"image": torch.randn(2, 3, side, side), "text": texts})


def families() -> dict[str, Zoo]:
    """Models by library and name."""
    return {
        "timm": {name: partial(_timm, name) for name in names("timm")},
        "torchvision": {name: partial(_torchvision, name) for name in names("torchvision")},
        "transformers": transformers_zoo.zoo(),
        "open_clip": {name: partial(_open_clip, name) for name in names("open_clip")},
        "diffusers": diffusers_zoo.zoo(),
    }
