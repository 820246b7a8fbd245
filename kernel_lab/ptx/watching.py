"""Watches what torch allocates and writes, so that kernels may touch that memory and nothing else."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernel_lab.ptx.allocations import Allocation, GlobalMemory


def register(memory: GlobalMemory, tensor: Tensor, name: str) -> Allocation:
    """The whole storage of a tensor becomes memory that kernels may touch."""
    storage = tensor.untyped_storage()
    return memory.register(name, storage.data_ptr(), storage.nbytes(), tensor.element_size(), storage)


def register_exactly(memory: GlobalMemory, tensor: Tensor, name: str) -> Allocation:
    """The same of a view, without what lies between its elements."""
    allocation = register(memory, tensor, name)
    if allocation.allowed is None:
        allocation.allowed = np.zeros(allocation.size, bool)
    item = tensor.element_size()
    if tensor.numel():
        size, stride = (*tensor.shape, item), (*(step * item for step in tensor.stride()), 1)
        marks = torch.from_numpy(allocation.allowed)
        marks.as_strided(size, stride, tensor.storage_offset() * item).fill_(True)
    return allocation


@contextmanager
def watching(memory: GlobalMemory) -> Iterator[None]:
    """Within it, all that torch allocates is registered. What it has not written is poisoned and known to be so."""
    from_numpy = torch.from_numpy

    def registered(array: Any) -> Tensor:
        tensor = from_numpy(array)
        register(memory, tensor, f"from_numpy{list(tensor.shape)}")
        return tensor

    with patch.object(torch, "from_numpy", registered), _Allocations(memory):  # which torch dispatches to nobody
        yield


class _Allocations(TorchDispatchMode):
    def __init__(self, memory: GlobalMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        name = func._schema.name.removeprefix("aten::")
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() in self._memory.allocations:
                continue
            allocation = register(self._memory, tensor, f"{name}{list(tensor.shape)}")
            if name.startswith("empty"):
                allocation.initialised = np.zeros(allocation.size, bool)
                allocation.bytes[:] = 0xFF
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._note_written(args[number] if number < len(args) else named.get(argument.name))
        return result

    def _note_written(self, written: Any) -> None:
        for tensor in _tensors(written):
            allocation = self._memory.allocations.get(tensor.untyped_storage().data_ptr())
            if allocation is not None:
                allocation.initialised = None


def _tensors(things: Any) -> Iterator[Tensor]:
    """Those that have memory."""
    for thing in tree_leaves(things):
        if isinstance(thing, Tensor) and thing.untyped_storage().data_ptr():
            yield thing
