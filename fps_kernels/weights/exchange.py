"""What processes tell each other: tensors of any lengths, in one exchange."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


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
    longest = max(numbers)
    padded = tensor.new_zeros(longest)
    padded[: tensor.numel()] = tensor
    everyone = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(everyone, padded, group=group)
    return [part[:number] for part, number in zip(everyone, numbers, strict=True)]
