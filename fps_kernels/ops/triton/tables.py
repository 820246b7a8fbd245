"""Tables of pointers and sizes, for kernels that serve a list of tensors of any number and shape in one launch."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Values: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

MOST_TABLES = 16
NEEDS_WARM_UP = (
    "a CUDA graph under capture needs a table of tensors that an earlier call has made: take a warm-up step with the same "
    "tensors before it, gradients included (zero_grad(set_to_none=False) keeps them in place)"
)

_Key = tuple[tuple[int | tuple[int, int], ...], torch.device]
_tables: OrderedDict[_Key, tuple[Tensor, torch.cuda.Stream, torch.cuda.Event]] = OrderedDict()
_kept_for_graphs: dict[_Key, Tensor] = {}
_owned_by_graphs: list[Tensor] = []


def device_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """An int64 tensor of ``values`` on ``device``, made without waiting for the device.

    The same values give the same tensor again, so a list of tensors that stay where they are is copied once. A CUDA graph
    under capture must find its tables made, by a warm-up call with the same tensors; they then live as long as the
    process, since the graph holds their address.

    Raises:
        RuntimeError: a CUDA graph is being captured and there is no such table yet.
    """
    return _cached(values, device, lambda: values)


def block_map(blocks: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """For each program what it works on, ``tensor << 32 | block``, from pairs of a tensor and the number of its blocks.

    Cached like :func:`device_table`.
    """
    return _cached(blocks, device, lambda: map_values(blocks))


def map_values(blocks: tuple[tuple[int, int], ...]) -> list[int]:
    """The numbers of a :func:`block_map`."""
    return [tensor << 32 | block for tensor, count in blocks for block in range(count)]


def _cached(content: tuple[int | tuple[int, int], ...], device: torch.device, values: Callable[[], Sequence[int]]) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(values(), dtype=torch.int64, device=device)
    key = (content, device)
    capturing = torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device)
    if key not in _tables:
        if capturing:
            raise RuntimeError(NEEDS_WARM_UP)
        table = torch.tensor(values(), dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
        _tables[key] = table, stream, stream.record_event()
        if len(_tables) > MOST_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    table, made_on, copied = _tables[key]
    if capturing:  # the capture began with a synchronisation, so the copy is done
        _kept_for_graphs[key] = table
    elif stream != made_on:
        stream.wait_event(copied)
        table.record_stream(stream)
    return table


class OwnTable:
    """An int64 tensor on a device that lives as long as its owner, who may write it anew, without waiting for the device.

    A CUDA graph may capture its use, and keeps it then: what is written later goes into another tensor.
    """

    def __init__(self, values: Sequence[int] | Values, device: torch.device) -> None:
        self._device = device
        self._kept = True  # by a graph, or by nobody yet: the next write makes a tensor
        self.write(np.asarray(values, dtype=np.int64))

    def write(self, values: Values) -> None:
        """As many values as before. The current device must be that of the table.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        if self._device.type != "cuda":
            self._tensor = torch.from_numpy(values)
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(NEEDS_WARM_UP)
        staged = torch.from_numpy(values).pin_memory()  # torch waits for the copy from there before it reuses this memory
        if self._kept:
            self._tensor, self._kept = staged.to(self._device, non_blocking=True), False
        else:
            self._tensor.copy_(staged, non_blocking=True)
        stream = torch.cuda.current_stream(self._device)
        self._stream, self._copied = stream.cuda_stream, stream.record_event()

    def read(self) -> Tensor:
        """The table, for a launch on the current stream."""
        device = self._device
        if device.type == "cuda":
            if torch._C._cuda_isCurrentStreamCapturing():  # the capture began with a synchronisation: the copy is done
                if not self._kept:
                    _owned_by_graphs.append(self._tensor)
                self._kept = True
            elif torch._C._cuda_getCurrentRawStream(device.index) != self._stream:
                stream = torch.cuda.current_stream(device)
                stream.wait_event(self._copied)
                self._tensor.record_stream(stream)
        return self._tensor
