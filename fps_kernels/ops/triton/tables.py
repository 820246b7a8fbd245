"""Tables of pointers and sizes, for kernels that serve a list of tensors of any number and shape in one launch.

A CUDA graph holds the address of a table that it captured, and nobody is told when the graph dies. So a captured table is
never written again, the same one is kept once, and one that belongs to an op lives as long as the memory that it points to,
without which the graph cannot be replayed either.
"""

import threading
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Values: TypeAlias = "array[int]"
"""Of the type ``q``, 64 bits."""

MOST_BYTES = 4 << 20  # of cached tables; those of a model with 200 weights are 40 KB, so that optimizers may take turns
NEEDS_WARM_UP = (
    "a CUDA graph under capture needs a table of tensors that an earlier call has made: take a warm-up step with the same "
    "tensors before it, gradients included (zero_grad(set_to_none=False) keeps them in place)"
)

_Key = tuple[tuple[int | tuple[int, int], ...], torch.device]


def device_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """An int64 tensor of ``values`` on ``device``, made without waiting for the device.

    The same values give the same tensor again, so a list of tensors that stay where they are is copied once. Of all such
    tensors those used last are kept, up to :data:`MOST_BYTES`. A CUDA graph under capture must find its tables made, by a
    warm-up call with the same tensors; they then live as long as the process, each of them once.

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
    return _cache.get((content, device), values)


def _staged(values: Values) -> Tensor:
    """In pinned memory, which torch gives to nobody else before the copy from there is done."""
    return _as_tensor(values).pin_memory()


def _as_tensor(values: Values) -> Tensor:
    """In the same memory."""
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64, device="cpu")


@dataclass
class _Made:
    """A cached table, where it was copied, and whether a graph has it."""

    table: Tensor
    stream: torch.cuda.Stream
    copied: torch.cuda.Event
    captured: bool = False

    @property
    def bytes(self) -> int:
        return self.table.numel() * 8


class TableCache:
    """Tables by content, for any number of threads: autograd runs backward passes in threads of its own.

    Args:
        most_bytes: of tables that no graph has; beyond it those that were not used for longest are dropped.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._made: OrderedDict[_Key, _Made] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._made)

    def get(self, key: _Key, values: Callable[[], Sequence[int]]) -> Tensor:
        """The table of a content on a device, made of ``values()`` where there is none, for the current stream."""
        device = key[1]
        capturing = torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device)
        with self._lock:
            made = self._made.get(key)
            if made is None:
                if capturing:
                    raise RuntimeError(NEEDS_WARM_UP)
                table = _staged(array("q", values())).to(device, non_blocking=True)
                made = self._made[key] = _Made(table, stream, stream.record_event())
                self._bytes += made.bytes
                self._drop()
            self._made.move_to_end(key)
            if capturing:  # the capture began with a synchronisation, so the copy is done
                self._bytes -= 0 if made.captured else made.bytes
                made.captured = True
                return made.table
        if stream != made.stream:
            stream.wait_event(made.copied)
            made.table.record_stream(stream)
        return made.table

    def _drop(self) -> None:
        last = next(reversed(self._made))
        for key in [key for key, made in self._made.items() if not made.captured and key != last]:
            if self._bytes <= self._most_bytes:
                return
            self._bytes -= self._made.pop(key).bytes


_cache = TableCache(MOST_BYTES)


class CapturedTables:
    """Tables that graphs have, by content, until the memory is freed that they point to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, dict[bytes, Tensor]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def keep(self, memory: Tensor, values: Values, table: Tensor) -> None:
        """Keep a table as long as the memory of a tensor is there."""
        storage = memory.untyped_storage()
        with self._lock:
            if storage._cdata not in self._kept:
                self._kept[storage._cdata] = {}
                weakref.finalize(storage, self._kept.pop, storage._cdata, None).atexit = False
            self._kept[storage._cdata][values.tobytes()] = table

    def find(self, memory: Tensor, values: Values) -> Tensor | None:
        """The table of these values, if a graph has one."""
        kept = self._kept.get(memory.untyped_storage()._cdata)
        return None if kept is None else kept.get(values.tobytes())


_captured = CapturedTables()


class OwnTable:
    """An int64 tensor on a device that lives as long as its owner, who may write it anew, without waiting for the device.

    A CUDA graph may capture its use: what is written later goes into another tensor, or into the one that a graph has of the
    same values.

    Args:
        values: what it holds.
        memory: a tensor whose address is among them, on the device that the table goes to.
    """

    def __init__(self, values: Sequence[int], memory: Tensor) -> None:
        self._memory = memory
        self._device = memory.device
        self._captured = True  # by a graph, or by nobody yet: the next write makes a tensor
        self.write(values if isinstance(values, array) else array("q", values))

    def write(self, values: Values) -> None:
        """As many values as before, which nobody changes afterwards. The current device must be that of the table.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self._values = values
        if self._device.type != "cuda":
            self._tensor = _as_tensor(values)
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(NEEDS_WARM_UP)
        known = _captured.find(self._memory, values)
        if known is not None:  # copied before its capture began with a synchronisation
            self._tensor, self._captured, self._copied = known, True, None
            return
        if self._captured:
            self._tensor, self._captured = _staged(values).to(self._device, non_blocking=True), False
        else:
            self._tensor.copy_(_staged(values), non_blocking=True)
        stream = torch.cuda.current_stream(self._device)
        self._stream, self._copied = stream.cuda_stream, stream.record_event()

    def read(self) -> Tensor:
        """The table, for a launch on the current stream."""
        device = self._device
        if device.type == "cuda":
            if torch._C._cuda_isCurrentStreamCapturing():  # the capture began with a synchronisation: the copy is done
                if not self._captured:
                    _captured.keep(self._memory, self._values, self._tensor)
                self._captured = True
            elif self._copied is not None and torch._C._cuda_getCurrentRawStream(device.index) != self._stream:
                stream = torch.cuda.current_stream(device)
                stream.wait_event(self._copied)
                self._tensor.record_stream(stream)
        return self._tensor
