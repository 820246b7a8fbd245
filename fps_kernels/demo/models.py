"""What the demo tunes: a small ViT that ships with the package, or any timm model from a local safetensors file."""

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn

DIGITS_CHECKPOINT = Path(__file__).with_name("digits_vit.safetensors")


def digits_vit(classes: int, pretrained: bool = True) -> nn.Module:
    """A ViT of 0.2 M parameters for 8×8 grey images, pretrained on the digits 0–4, with a new head.

    Args:
        classes: outputs of the head.
        pretrained: load the weights that ship with the package (``python -m fps_kernels.demo.pretrain`` makes them).
    """
    model: nn.Module = timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=classes, embed_dim=64, depth=4, num_heads=4, global_pool="avg"
    )
    if pretrained:
        state = {name: value.float() for name, value in load_file(DIGITS_CHECKPOINT).items()}
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert all(name.startswith("head.") for name in missing), missing
    return model


def timm_model(name: str, checkpoint: Path | None, classes: int, image_size: int | None) -> nn.Module:
    """A timm model with a new head.

    Args:
        name: of the architecture.
        checkpoint: a safetensors file with timm's keys; position embeddings are resized. ``None``: random weights.
        classes: outputs of the head.
        image_size: side of the images, ``None`` for the model's own.

    Raises:
        ValueError: a file that is no safetensors file, or an unknown architecture.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: timm.list_models() names them all")
    if checkpoint is not None and checkpoint.suffix != ".safetensors":
        raise ValueError(f"{checkpoint} must be a .safetensors file: pickled checkpoints are not read")
    if checkpoint is not None and not checkpoint.is_file():
        raise ValueError(f"there is no file {checkpoint}")
    size = {} if image_size is None else {"img_size": image_size}
    if checkpoint is None:
        model: nn.Module = timm.create_model(name, num_classes=classes, **size)
        return model
    overlay = {"file": str(checkpoint), "source": "file"}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **size)
    return model.to(torch.float32)
