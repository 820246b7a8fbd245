"""A model whose weights are of many kinds, and what ``fully_shard`` makes of it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class InputsFirst(nn.Module):
    """A linear map whose weight is ``[inputs, outputs]``, as Hugging Face's ``Conv1D``: shards cut rows in the middle."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.2)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Block(nn.Module):
    """Packed attention of three different inputs, an MLP of odd width, and a weight whose rows are cut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 25), nn.Linear(25, width)
        self.mixed = InputsFirst(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x + 0.1, x * 2)[0]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return x + self.mixed(x)


class Mixture(nn.Module):
    """Convolutions, one of them in groups, two blocks and a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, width, 3, padding=1, groups=3)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def mixture() -> Mixture:
    """Always the same one."""
    torch.manual_seed(1)
    return Mixture()


def shard(model: Any, **options: Any) -> Any:
    """Each block and the rest, as one does."""
    for block in getattr(model, "blocks", ()):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def batches(count: int = 3, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Images and labels, always the same."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(count, size, 3, 16, 16, generator=generator), torch.randint(5, (count, size), generator=generator)
    return list(zip(x, y, strict=True))


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters of a model, sharded or not, as copies."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # the root stays whole after a pass
            module.reshard()
    own = {name: p for name, p in model.named_parameters() if "_selected" not in name}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in own.items()}


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Of all parameters."""
    a, b = whole(one), whole(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
