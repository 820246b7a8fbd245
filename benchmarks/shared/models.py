"""Models that more than one benchmark measures on."""

import timm
from torch import nn


def tiny() -> nn.Module:
    """A ViT that costs the host more than the processor: twelve blocks, layers 48 wide, four tokens an image."""
    model: nn.Module = timm.create_model(
        "vit_base_patch16_224", img_size=32, embed_dim=48, num_heads=4, depth=12, num_classes=10
    )
    return model
