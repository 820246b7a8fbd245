"""The small ViT that ships with the package."""

from pathlib import Path

import timm
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
