"""The processes of one run: those that ``torchrun`` started, each on a part of every batch, or one."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fps_kernels.weights.exchange import all_gathered

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """What this process has to know of the others.

    Batches are split, not multiplied: a run of several processes takes the steps of one process, to rounding.

    Attributes:
        rank: which of them this one is.
        size: how many there are.
        control: the group in which they decide, on the CPU; ``None`` for one process.
    """

    rank: int = 0
    size: int = 1
    control: Any = None

    @property
    def first(self) -> bool:
        """Whether it is this one that writes and tells."""
        return self.rank == 0

    def place(self, device: torch.device) -> torch.device:
        """The device of this process."""
        if device.type != "cuda" or self.size == 1:
            return device
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device

    def barrier(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def any_of(self, *flags: bool) -> list[bool]:
        """Which of the flags any process has set."""
        if self.size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int64, device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return [bool(flag) for flag in found]

    def as_first(self, flag: bool) -> bool:
        """What the first process says."""
        return self.any_of(flag and self.first)[0]

    def share(self, images: int) -> int:
        """How many images of a batch are this process's."""
        return len(range(self.rank, images, self.size))

    def parts(self, batches: Iterable[Sequence[T]]) -> Iterator[list[T]]:
        """This process's images of each batch; where it has none, one that does not count."""
        for batch in batches:
            yield list(batch[self.rank :: self.size]) or list(batch[:1])

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return numbers
        summed = numbers.clone()
        dist.all_reduce(summed)
        return summed

    @torch.no_grad()
    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in one exchange."""
        if self.size == 1:
            return
        held = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in held])
        dist.all_reduce(flat)
        for p, part in zip(held, flat.split([p.numel() for p in held]), strict=True):
            if p.grad is not None:
                p.grad.copy_(part.view_as(p))

    def collected(self, numbers: Tensor) -> list[Tensor]:
        """One-dimensional tensors on the CPU of all processes."""
        return [numbers] if self.size == 1 else all_gathered(numbers, self.control)


@contextmanager
def joined(cuda: bool) -> Iterator[Processes]:
    """The processes that ``torchrun`` started, inside; one process where it did not.

    Args:
        cuda: whether they compute on GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or dist.is_initialized():
        yield Processes()
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), size, dist.new_group(backend="gloo") if cuda else dist.group.WORLD)
    finally:
        dist.destroy_process_group()
