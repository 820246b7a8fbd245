"""Sizes that more than one benchmark measures on, and entries chosen at random."""

import torch
from torch import Tensor


def block(width: int) -> list[tuple[int, int]]:
    """The matrices of a block of a ViT with MLP ratio 4, outputs by inputs."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


VIT_B = block(768) * 12 + [(768, 768)]  # the last is the patch embedding


def entries(k: int, O: int, C: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """CSR of ``k`` random columns in each of ``O`` rows: offsets int32 ``[O + 1]``, columns int32 ``[O * k]``."""
    columns = torch.rand(O, C, device=device).topk(k).indices.sort().values.int().flatten()
    return torch.arange(O + 1, dtype=torch.int32, device=device) * k, columns
