"""How near two results must be that were summed in different orders."""

import torch
from torch import Tensor


def assert_sums_close(found: Tensor, expected: Tensor, relative: float = 1e-5, name: str = "") -> None:
    """Differences are measured by the largest sum: where the terms of one cancel, its error stays that of the terms."""
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * largest + 1e-7, msg=lambda m: f"{name}: {m}")
