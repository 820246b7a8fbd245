"""What processes tell each other: tensors of any lengths, in one exchange, and numbers of which each has a part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fps_kernels.weights.shards import Shard


def all_gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """One-dimensional tensors of all processes of a group, which may be of different lengths.

    Args:
        tensor: of this process, on a device that the group exchanges tensors of.
        group: of ``torch.distributed``.
    """
    size = dist.get_world_size(group)
    lengths = torch.zeros(size, dtype=torch.int64, device=tensor.device)
    lengths[dist.get_rank(group)] = tensor.numel()
    dist.all_reduce(lengths, group=group)
    numbers = lengths.tolist()
    padded = tensor.new_zeros(max(numbers))
    padded[: tensor.numel()] = tensor
    everyone = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(everyone, padded, group=group)
    return [part[:number] for part, number in zip(everyone, numbers, strict=True)]


@dataclass(frozen=True, eq=False)
class Division:
    """Numbers, in an order that all processes know, of which each process has some.

    Attributes:
        shard: of the parameter that they are of.
        parts: which of them each process has, ascending.
        total: how many there are.
    """

    shard: Shard
    parts: tuple[slice | Tensor, ...]
    total: int

    @classmethod
    def of_all(cls, shard: Shard) -> "Division":
        """Of all numbers of a parameter, in its order."""
        shape, dim = tuple(shard.parameter.shape), shard.dim
        parts: list[slice | Tensor] = []
        for first, last in shard.bounds:
            if dim == 0:
                step = shard.parameter.numel() // max(shape[0], 1)
                parts.append(slice(first * step, last * step))
            else:
                places = torch.arange(shard.parameter.numel(), device="cpu").view(shape)
                parts.append(places.narrow(dim, first, last - first).flatten())
        return cls(shard, tuple(parts), shard.parameter.numel())

    def own(self, whole: Tensor) -> Tensor:
        """What this process has of all numbers."""
        part = self.parts[self.shard.rank]
        return whole[part if isinstance(part, slice) else part.to(whole.device)]

    def lengths(self) -> list[int]:
        """How many numbers each process has."""
        return [part.stop - part.start if isinstance(part, slice) else part.numel() for part in self.parts]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """All numbers, of what each process has."""
        whole = parts[0].new_empty(self.total)
        for where, part in zip(self.parts, parts, strict=True):
            whole[where if isinstance(where, slice) else where.to(whole.device)] = part
        return whole


def gathered(divisions: Sequence[Division], own: Sequence[Tensor]) -> list[Tensor]:
    """All numbers of several divisions among the same processes, of this process's parts of them: one exchange a dtype.

    Args:
        divisions: of numbers, in an order that all processes share.
        own: one-dimensional: what this process has of each.

    Returns:
        One-dimensional tensors on the devices of the parts.
    """
    made: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(part.dtype for part in own):
        chosen = [i for i, part in enumerate(own) if part.dtype == dtype]
        shard = divisions[chosen[0]].shard
        everyone = all_gathered(torch.cat([own[i].detach() for i in chosen]).to(shard.device), shard.group)
        lengths = [divisions[i].lengths() for i in chosen]
        split = [part.split([n[rank] for n in lengths]) for rank, part in enumerate(everyone)]
        for place, i in enumerate(chosen):
            made[i] = divisions[i].joined([parts[place] for parts in split]).to(own[i].device)
    return [made[i] for i in range(len(own))]
