"""What a model is shown of an image: timm's transforms, and what is done to training images at random."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

AUGMENTATIONS = ("none", "flip", "crop")


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images at random.

    Attributes:
        kind: ``none``, ``flip`` (left and right) or ``crop`` (a random part, and flip).
        crop_scale: smallest share of the image's area that a crop shows.
        policy: timm's name of a policy, such as ``rand-m9-mstd0.5`` or ``augmix-m3-w3``; ``None`` for none.
        color_jitter: strength of changes of brightness, contrast and saturation; 0 for none.
        erase: chance that a rectangle is erased (Zhong et al., AAAI 2020).
    """

    kind: str = "none"
    crop_scale: float = 0.5
    policy: str | None = None
    color_jitter: float = 0.0
    erase: float = 0.0


def as_seen_by(config: dict[str, Any], augmentation: Augmentation | None = None) -> Callable[[Image.Image], Tensor]:
    """From an image to what the model takes, ``[C, H, W]`` float32.

    Args:
        config: ``timm.data.resolve_model_data_config(model)``.
        augmentation: what to do at random; nothing if not given.

    Raises:
        ValueError: a policy that timm does not know.
    """
    a = augmentation or Augmentation()
    shown: dict[str, Any] = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
    random = {"auto_augment": a.policy, "color_jitter": a.color_jitter or None, "re_prob": a.erase, "re_mode": "pixel"}
    if a.kind == "crop":
        made = _created(a, **shown, is_training=True, scale=(a.crop_scale, 1.0), hflip=0.5, **random)
    elif a == Augmentation(a.kind, a.crop_scale):
        made = create_transform(**shown, is_training=False, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
    else:  # the largest square in the middle, changed in colour and so on
        made = _created(a, **shown, is_training=True, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, **random)
    if a.kind == "flip":
        made = transforms.Compose([transforms.RandomHorizontalFlip(), made])
    transform: Callable[[Image.Image], Tensor] = made
    return transform


def _created(a: Augmentation, **options: Any) -> Any:
    try:
        return create_transform(**options)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"--auto-augment {a.policy}: timm has no such policy; try rand-m9-mstd0.5: {error}") from error
