"""How a delta lies in a file: columns in as few bits as they need, values one after the other; see ``docs/format.md``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fps_kernels import ops
from fps_kernels.selection import Selection, WeightSelection, uniform_row_offsets
from fps_kernels.storage.bits import bits_for, pack, packed_size, unpack
from fps_kernels.storage.checked_file import (
    Path_,
    distrusted,
    format_of,
    read,
    texts,
    texts_by_name,
    whole_number,
    whole_numbers,
    write,
)
from fps_kernels.weights.matrix import MatrixLayout

FORMAT = "fps_kernels.delta.1"
WITH_BUFFERS = "fps_kernels.delta.2"  # so that a reader that knows no buffers refuses it by its version
FORMATS = (FORMAT, WITH_BUFFERS)
_STORED = {torch.float32: "values_float32", torch.bfloat16: "values_bfloat16"}
_BUFFER_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def can_hold(buffer: Tensor) -> bool:
    """Whether a file has a place for a buffer of this dtype."""
    return buffer.dtype in _BUFFER_DTYPES.values()


@dataclass(eq=False)
class DeltaContent:
    """What a delta file holds; see :class:`fps_kernels.Delta`."""

    selection: Selection
    values: dict[str, Tensor]
    dense: dict[str, Tensor]
    base: str
    versions: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    buffers_left_out: tuple[str, ...] = ()
    added: bool = False


def write_file(path: Path_, delta: DeltaContent, dtype: torch.dtype | None) -> None:
    """Write a delta with its values in ``dtype``, or as they are. Buffers are written as they are.

    Raises:
        ValueError: a buffer of a dtype that a file has no place for. Nothing is written then.
    """
    weights: dict[str, Any] = {}
    packed: list[Tensor] = []
    values: dict[torch.dtype, list[Tensor]] = {torch.float32: [], torch.bfloat16: []}
    for name, w in delta.selection.weights.items():
        lengths = w.row_offsets.diff()
        described: dict[str, Any] = {"layout": w.layout.description(), "entries": w.nnz}
        if w.nnz and bool((lengths == lengths[0]).all()):
            described["row_length"] = int(lengths[0])
        else:
            packed.append(pack(lengths, bits_for(int(lengths.max()) if lengths.numel() else 0)))
            described["row_bits"] = bits_for(int(lengths.max()) if lengths.numel() else 0)
        packed.append(pack(w.columns, bits_for(w.layout.shape[1] - 1)))
        _append(values, described, delta.values[name], dtype)
        weights[name] = described
    dense = {}
    for name, t in delta.dense.items():
        dense[name] = {"shape": list(t.shape)}
        _append(values, dense[name], t, dtype)
    content = {
        "base": delta.base,
        "weights": weights,
        "dense": dense,
        "description": delta.selection.description,
        "density": delta.selection.density,
        "versions": delta.versions,
    }
    tensors = {"indices": torch.cat(packed)} if packed else {}
    tensors |= {_STORED[d]: torch.cat(parts) for d, parts in values.items() if parts}
    if delta.buffers:
        content["buffers"] = {
            name: {"shape": list(b.shape), "dtype": str(b.dtype).removeprefix("torch.")} for name, b in delta.buffers.items()
        }
        tensors |= _joined(delta.buffers)
    if delta.added:
        content["added"] = True
    if delta.buffers_left_out:
        content["buffers_left_out"] = list(delta.buffers_left_out)
    write(path, WITH_BUFFERS if delta.buffers else FORMAT, content, tensors)


def read_file(path: Path_) -> DeltaContent:
    """Read what :func:`write_file` wrote; everything is checked.

    Raises:
        ValueError: the file is no delta, is cut off or changed, or what it says does not fit together.
        OSError: it cannot be read.
    """
    found = format_of(path)
    content, tensors = read(path, WITH_BUFFERS if found == WITH_BUFFERS else FORMAT, "delta")
    with distrusted(path):
        # What is left of the tensors after the buffers is what a file without buffers has.
        buffers = _read_buffers(content["buffers"], tensors) if found == WITH_BUFFERS else {}
        delta = _read(content, tensors)
        left_out = tuple(texts(content.get("buffers_left_out", [])))
        for names in (delta.selection.weights, delta.dense, left_out):
            if both := sorted(buffers.keys() & set(names)):
                raise ValueError(f"it has {both[0]} twice, as a buffer and as something else")
        delta.buffers, delta.buffers_left_out, delta.added = buffers, left_out, content.get("added", False) is True
        return delta


def _joined(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Buffers of one dtype one after the other: a network has hundreds, which would have a header as large as they are."""
    parts: dict[str, list[Tensor]] = {}
    for name, b in buffers.items():
        if not can_hold(b):
            known = ", ".join(_BUFFER_DTYPES)
            raise ValueError(f"the buffer {name} is {b.dtype}, and a delta file holds {known}: take it out of delta.buffers")
        kind = str(b.dtype).removeprefix("torch.")
        parts.setdefault(f"buffers_{kind}", []).append(b.detach().reshape(-1).cpu())
    return {name: torch.cat(found) for name, found in parts.items()}


def _append(
    values: dict[torch.dtype, list[Tensor]], described: dict[str, Any], tensor: Tensor, dtype: torch.dtype | None
) -> None:
    stored = dtype or (torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32)
    values[stored].append(tensor.detach().reshape(-1).to("cpu", stored))
    if stored == torch.bfloat16:
        described["bfloat16"] = True


class _Stream:
    """Takes parts of a tensor from the front."""

    def __init__(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if tensor.dtype != dtype or tensor.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional {dtype}, found {tensor.dtype} {list(tensor.shape)}")
        self.name, self.rest = name, tensor

    def take(self, count: int) -> Tensor:
        if not 0 <= count <= self.rest.numel():
            raise ValueError(f"{self.name} has {self.rest.numel()} items left, {count} are needed")
        part, self.rest = self.rest[:count], self.rest[count:]
        return part

    def check_empty(self) -> None:
        if self.rest.numel():
            raise ValueError(f"{self.name} has {self.rest.numel()} items too many")


def _read_buffers(described: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The buffers of a file, whose tensors are taken out of ``tensors``."""
    streams = {}
    for kind, dtype in _BUFFER_DTYPES.items():
        if (found := tensors.pop(f"buffers_{kind}", None)) is not None:
            streams[kind] = _Stream(f"buffers_{kind}", found, dtype)
            if dtype == torch.bool and bool((found.view(torch.uint8) > 1).any()):
                raise ValueError(f"buffers_{kind} has bytes that are neither 0 nor 1")
    buffers = {}
    for name, said in described.items():
        if said["dtype"] not in streams:
            raise ValueError(f"the buffer {name} is {said['dtype']!r}, of which the file has none")
        shape = whole_numbers(said["shape"])
        # A slice of its own, so that a buffer that is kept keeps no others.
        buffers[name] = streams[said["dtype"]].take(math.prod(shape)).view(shape).clone()
    for stream in streams.values():
        stream.check_empty()
    return buffers


def _read(content: dict[str, Any], tensors: dict[str, Tensor]) -> DeltaContent:
    indices = _Stream("indices", tensors.get("indices", torch.empty(0, dtype=torch.uint8, device="cpu")), torch.uint8)
    streams = {d: _Stream(n, tensors.get(n, torch.empty(0, dtype=d, device="cpu")), d) for d, n in _STORED.items()}
    if extra := sorted(tensors.keys() - {"indices", *_STORED.values()}):
        raise ValueError(f"it has a tensor {extra[0]!r} that does not belong there")
    weights, values, dense = {}, {}, {}
    for name, said in content["weights"].items():
        layout = MatrixLayout.described(said["layout"])
        O, C = layout.shape
        nnz = whole_number(said["entries"])
        if nnz > O * C or max(nnz, O, C) > ops.MAX_NNZ:
            raise ValueError(f"{name} of shape {list(layout.parameter_shape)} cannot have {nnz} chosen entries")
        values[name] = streams[_stored(said)].take(nnz)
        if "row_length" in said:  # checked against what the file holds before anything of that size is made
            if whole_number(said["row_length"], 1) * O != nnz:
                raise ValueError(f"{name} has {nnz} entries, not {said['row_length']} in each of {O} rows")
            row_offsets = uniform_row_offsets(O, said["row_length"])
        else:
            bits = whole_number(said["row_bits"], 1)
            if bits > 31:
                raise ValueError(f"{name} has row lengths of {bits} bits")
            lengths = unpack(indices.take(packed_size(O, bits)), O, bits)
            ends = lengths.long().cumsum(0)
            if (total := int(ends[-1]) if O else 0) != nnz:
                raise ValueError(f"{name}: its rows have {total} entries, not {nnz}")
            row_offsets = torch.cat([ends.new_zeros(1), ends]).int()
        bits = bits_for(C - 1)
        columns = unpack(indices.take(packed_size(nnz, bits)), nnz, bits)
        try:
            weights[name] = WeightSelection(layout, row_offsets, columns)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    for name, said in content["dense"].items():
        shape = whole_numbers(said["shape"])
        count = 1
        for size in shape:
            count *= size
        dense[name] = streams[_stored(said)].take(count).view(shape)
    for stream in (indices, *streams.values()):
        stream.check_empty()
    if not isinstance(content["base"], str):
        raise ValueError(f"its base is {content['base']!r}")
    selection = Selection(weights, tuple(dense), description=texts_by_name(content["description"]))
    return DeltaContent(selection, values, dense, content["base"], texts_by_name(content["versions"]))


def _stored(said: Mapping[str, Any]) -> torch.dtype:
    return torch.bfloat16 if said.get("bfloat16") else torch.float32
