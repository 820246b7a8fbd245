"""The models that the checks run, and a batch for them."""

import timm
import torch
from torch import Tensor, nn


def classifier(
    name: str, device: torch.device, batch: int, quick: bool, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of timm with random weights, in training mode, with images and labels; a small one where it is ``quick``."""
    name, size, batch = ("vit_tiny_patch16_224", 64, min(batch, 2)) if quick else (name, 224, batch)
    model = timm.create_model(name, img_size=size, **({"depth": 2} if quick else {})).to(device, dtype).train()
    x = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    return model, x, torch.randint(1000, (batch,), device=device)
