"""A tensor in fewer bits, until somebody asks for it."""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fps_kernels import ops
from fps_kernels.ops.packing import along_memory

Pass = Callable[[Tensor], Any]  # of hooks further out: to where packed memory is sent, or back from there


class _Reading(threading.local):
    """Whether this thread only looks at what another node keeps, which is going to ask for it, too."""

    looks = False


_reading = _Reading()


class Packed(ABC):
    """Memory of one tensor, or of views of it that cover the same numbers.

    Attributes:
        dtype: of the tensor.
    """

    def __init__(self, t: Tensor, send: Pass | None, back: Pass | None) -> None:
        self.dtype = t.dtype
        self._numbers, self._strides = t.shape, t.stride()
        self._send, self._back = send, back
        self._memory: weakref.ref[Tensor] | None = None
        self._held: Tensor | None = None
        self._parts: tuple[Any, ...] = ()
        self._keep(self._pack(t))

    def _keep(self, parts: tuple[Tensor, ...]) -> None:
        self._parts = parts if self._send is None else tuple(map(self._send, parts))

    @abstractmethod
    def _pack(self, t: Tensor) -> tuple[Tensor, ...]:
        """What is kept of the tensor."""

    @abstractmethod
    def _unpack(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The tensor, of what is kept."""

    def tensor(self) -> Tensor:
        """The tensor, as the one that was packed lay in memory, if that was dense."""
        found, self._held = self._held, None
        if found is None and self._memory is not None:
            found = self._memory()  # another node has it at this moment
        if found is None:
            parts = self._parts if self._back is None else tuple(map(self._back, self._parts))
            found = self._unpack(parts)
            self._memory = weakref.ref(found)
        if _reading.looks:
            self._held = found
        return found


class Groups(Packed):
    """By :func:`fps_kernels.ops.pack_groups`."""

    BITS = 8

    def _pack(self, t: Tensor) -> tuple[Tensor, ...]:
        if isinstance(t, FakeTensor):
            return tuple(torch.ops.fps_kernels.pack_groups(t, self.BITS))
        packed: tuple[Tensor, Tensor] = ops.implementation("pack_groups", t.device).pack_groups(
            along_memory(t), self.BITS, None
        )
        return packed

    def _unpack(self, parts: tuple[Tensor, ...]) -> Tensor:
        out: Tensor = torch.ops.fps_kernels.unpack_groups(*parts, self._numbers, self._strides, self.dtype, self.BITS)
        return out


class Heads(Groups):
    """What may be queries or keys of a fused attention, and is told a little later: it is itself until then.

    Queries and keys take 12 bits, where they have more than 16: 8, and 4 of what these leave. A fused attention keeps the
    logarithms of its sums and computes probabilities as ``exp(q k - logsumexp)`` again, so that an error of a score is one
    of the probability's exponent.
    """

    def __init__(self, t: Tensor, send: Pass | None, back: Pass | None) -> None:
        self._waiting: Tensor | None = t
        self._version = t._version
        self._attended = False
        self._changed: RuntimeError | None = None
        super().__init__(t, send, back)

    def _pack(self, t: Tensor) -> tuple[Tensor, ...]:
        return () if self._waiting is not None else super()._pack(t)

    def settle(self, attended: bool) -> None:
        """It is known what it is.

        Args:
            attended: it is a query or key of a fused attention.
        """
        t, self._waiting = self._waiting, None
        if t is None:
            return
        self._changed = changed_in_place(t, self._version)
        if self._changed is None:
            self._attended = attended
            self._keep(self._pack_finely(t) if attended else self._pack(t))

    def _pack_finely(self, t: Tensor) -> tuple[Tensor, ...]:
        if t.dtype is not torch.float32:  # a copy: the tensor may be a view of more
            return (t.clone(memory_format=torch.preserve_format),)
        packed = self._pack(t)
        left = torch.sub(t, super()._unpack(packed))
        return *packed, *torch.ops.fps_kernels.pack_groups(left, 4)

    def _unpack(self, parts: tuple[Tensor, ...]) -> Tensor:
        if not self._attended:
            return super()._unpack(parts)
        if len(parts) == 1:
            return parts[0]
        found = super()._unpack(parts[:2])
        left = torch.ops.fps_kernels.unpack_groups(*parts[2:], found.shape, found.stride(), self.dtype, 4)
        return found.add_(left)

    def tensor(self) -> Tensor:
        waiting = self._waiting
        changed = self._changed if waiting is None else changed_in_place(waiting, self._version)
        if changed is not None:
            raise changed
        return super().tensor() if waiting is None else waiting


class Mask(Packed):
    """One bit for each number of a dense mask: whether it is the one that is not zero."""

    def _pack(self, t: Tensor) -> tuple[Tensor, ...]:
        flat = along_memory(t)
        scale = flat.new_ones(()) if t.dtype is torch.bool else flat[:64].max()
        return _bits(flat != 0), scale

    def _unpack(self, parts: tuple[Tensor, ...]) -> Tensor:
        bits, scale = parts
        mask = _booleans(bits, self._numbers.numel())
        found = mask if self.dtype is torch.bool else mask.to(self.dtype).mul_(scale)
        return found.as_strided(self._numbers, self._strides)


class Signs(Packed):
    """One bit for each number of a dense tensor: whether it is positive, or NaN. It comes back as ones and zeros."""

    def _pack(self, t: Tensor) -> tuple[Tensor, ...]:
        return (_bits((along_memory(t) <= 0).logical_not_()),)

    def _unpack(self, parts: tuple[Tensor, ...]) -> Tensor:
        mask = _booleans(parts[0], self._numbers.numel())
        return mask.to(self.dtype).as_strided(self._numbers, self._strides)


# Of eight bytes that are 0 or 1, as one integer: times _GATHER has them as the bits of its highest byte, the first one
# lowest. A byte times _REPEAT has it eight times, of which _PLACES leaves one bit each.
_GATHER, _REPEAT, _PLACES = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - (1 << 64)


def _bits(mask: Tensor) -> Tensor:
    """Eight booleans a byte, the first one lowest; ``mask`` is flat."""
    missing = -mask.numel() % 8
    if missing:
        mask = torch.cat([mask, mask.new_zeros(missing)])
    return (mask.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def _booleans(bits: Tensor, numbers: int) -> Tensor:
    """What :func:`_bits` was given."""
    return ((bits.to(torch.int64) * _REPEAT & _PLACES).view(torch.uint8) != 0)[:numbers]


def changed_in_place(t: Tensor, version: int) -> RuntimeError | None:
    """What torch says when a tensor that a node keeps is not at this version any more; ``None`` if it is."""
    if t._version == version:
        return None
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{t.type()} {list(t.shape)}] is at version {t._version}; expected version {version} instead"
    )


class _Looking:
    def __enter__(self) -> None:
        _reading.looks = True

    def __exit__(self, *_: object) -> None:
        _reading.looks = False


looking = _Looking()
"""Inside, what is asked for is kept for the node that it belongs to, which is going to ask for it next."""
