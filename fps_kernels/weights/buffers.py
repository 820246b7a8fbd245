"""A model's persistent buffers: what training changes beside parameters, such as the statistics of batch norms."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from fps_kernels.weights.matrix import is_simulated
from fps_kernels.weights.survey import Survey

_COPIED = 2**20  # bytes up to which a buffer is noted as a copy; of a larger one a checksum is
_CHUNK = 2**17  # int64 numbers that a checksum takes at once


@dataclass(frozen=True)
class _Note:
    """One buffer as it was: a copy on the CPU, or what tells whether it has changed."""

    dtype: torch.dtype
    shape: torch.Size
    copy: Tensor | None
    checksum: int

    @classmethod
    def of(cls, b: Tensor) -> "_Note":
        small = b.numel() * b.element_size() <= _COPIED
        return cls(b.dtype, b.shape, b.to("cpu", copy=True) if small else None, 0 if small else _checksum(b))

    def holds_of(self, b: Tensor) -> bool:
        """Whether a buffer has these values, or what a conversion of the model has made of them."""
        if b.shape != self.shape:
            return False
        if self.copy is not None:
            return same_bits(b.cpu(), self.copy.to(b.dtype))
        return b.dtype == self.dtype and _checksum(b) == self.checksum


class BufferNotes:
    """The persistent buffers of a model as they were at one moment, so that it can be told later which of them changed.

    Buffers of up to 1 MiB are copied to the CPU. Of larger ones (masks, packed weights) a checksum is taken where they lie.
    Buffers without values (on the meta device, simulated) or that are no plain tensors are passed over.

    Args:
        model: the model.

    Example:
        >>> notes = BufferNotes(model)
        >>> notes.changed(model)  # later
    """

    def __init__(self, model: nn.Module | Survey) -> None:
        self._notes = {name: _Note.of(b) if has_values(b) else None for name, b in persistent_buffers(model).items()}

    @torch.no_grad()
    def changed(self, model: nn.Module | Survey) -> dict[str, Tensor]:
        """The persistent buffers that have other bits or another shape by now, or are new, by name; views, not copies."""
        found = {}
        for name, b in persistent_buffers(model).items():
            note = self._notes.get(name)
            if has_values(b) and (name not in self._notes or (note is not None and not note.holds_of(b))):
                found[name] = b
        return found

    def has(self, name: str, shape: torch.Size) -> bool:
        """Whether there was such a buffer, of this shape: a model as it was then has a place for its values."""
        note = self._notes.get(name)
        return note is not None and note.shape == shape


def persistent_buffers(model: nn.Module | Survey) -> dict[str, Tensor]:
    """The buffers that are in ``model.state_dict()``, by all their names there."""
    found = {}
    for path, module in Survey.of(model).modules.items():
        passing = getattr(module, "_non_persistent_buffers_set", ())
        for leaf, b in module.named_buffers(recurse=False, remove_duplicate=False):
            if leaf not in passing:
                found[f"{path}.{leaf}" if path else leaf] = b.detach()
    return found


def has_values(b: Tensor) -> bool:
    """Whether there are numbers to look at: not on the meta device, simulated, or in a tensor that is no plain one."""
    plain = type(b).__torch_dispatch__ is Tensor.__torch_dispatch__ and b.layout == torch.strided and not b.is_quantized
    return plain and not (isinstance(b, UninitializedBuffer) or b.is_meta or is_simulated(b))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape, dtype and device hold the same bits; a NaN is the same as itself."""
    return a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(b: Tensor) -> Tensor:
    return b.detach().contiguous().view(-1).view(torch.uint8)


def _checksum(b: Tensor) -> int:
    """64 bits that any change of one number changes, and any other change almost surely; no copy is made.

    Numbers are multiplied by odd ones that depend on their places, and added up modulo 2**64, on the device.
    """
    flat = _bytes(b)
    generator = torch.Generator().manual_seed(0)
    factors = (torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator, device="cpu") | 1).to(b.device)
    scratch = torch.empty(8 * _CHUNK, dtype=torch.uint8, device=b.device)  # aligned, whatever the buffer is
    total = torch.zeros((), dtype=torch.int64, device=b.device)
    for part in flat.split(8 * _CHUNK):
        scratch[: part.numel()] = part
        scratch[part.numel() :] = 0
        total = total * 6364136223846793005 + (scratch.view(torch.int64) * factors).sum()
    return int(total)
