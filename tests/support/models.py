"""Small models that the tests share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """A patch embedding, a norm, a hidden layer and a head: every role a parameter can play."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, 4)
        self.norm = nn.LayerNorm(12)
        self.hidden = nn.Linear(12, 20)
        self.out = nn.Linear(20, 12, bias=False)
        self.position = nn.Parameter(torch.randn(1, 4, 12) * 0.1)
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.out(F.gelu(self.hidden(self.norm(x))))
        return self.head(x.mean(1))


def images(count: int = 6, device: torch.device | None = None) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(count, 3, 8, 8).to(device)


def labelled(count: int = 6, classes: int = 5, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The same numbers on every device."""
    return images(count, device), torch.randint(classes, (count,)).to(device)
