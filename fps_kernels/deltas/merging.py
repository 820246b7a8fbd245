"""Several deltas to one base as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fps_kernels.deltas.delta import Delta
from fps_kernels.deltas.making import package_versions
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.weights.buffers import same_bits
from fps_kernels.weights.matrix import MatrixLayout


@dataclass(frozen=True)
class Conflict:
    """Entries of one parameter, or of one buffer, that two deltas both changed, to different values.

    Attributes:
        name: the parameter or buffer.
        entries: how many.
        largest: the largest difference between the two values.
    """

    name: str
    entries: int
    largest: float


def merge(
    deltas: Sequence[Delta], on_conflict: Literal["error", "first", "last", "mean"] = "error"
) -> tuple[Delta, list[Conflict]]:
    """Several deltas to one base as one.

    Args:
        deltas: at least one, all of one base.
        on_conflict: what becomes of an entry to which two deltas give different values: an error, the value of the first
            or the last delta that has it, or the mean of all that have it. Buffers are taken whole, and have no mean:
            counters and statistics of norms belong to the weights that they were gathered with.

    Returns:
        The merged delta, values in float32, and one :class:`Conflict` for each parameter that has any.

    Raises:
        ValueError: no delta, deltas of different bases or of different shapes, or conflicts where they are errors; buffers
            that differ where the mean was asked for.
    """
    if on_conflict not in ("error", "first", "last", "mean"):
        raise ValueError(f"on_conflict must be error, first, last or mean, got {on_conflict!r}")
    if not deltas:
        raise ValueError("there is no delta to merge")
    if len({delta.base for delta in deltas}) > 1:
        raise ValueError("the deltas are of different base models: their fingerprints differ")
    for delta in deltas:
        delta.check_written()
    names = dict.fromkeys(name for delta in deltas for name in (*delta.values, *delta.dense))
    weights, values, dense, conflicts = {}, {}, {}, []
    for name in names:
        parts = [(d.selection.weights.get(name), d.values.get(name, d.dense.get(name))) for d in deltas]
        found, conflict = _merged(name, [(w, v) for w, v in parts if v is not None], on_conflict)
        conflicts += [conflict] if conflict else []
        if isinstance(found, Tensor):
            dense[name] = found
        else:
            weights[name], values[name] = found
    buffers = {}
    for name in dict.fromkeys(name for delta in deltas for name in delta.buffers):
        buffers[name], conflict = _merged_buffer(name, [d.buffers[name] for d in deltas if name in d.buffers], on_conflict)
        conflicts += [conflict] if conflict else []
    left_out = tuple(dict.fromkeys(n for delta in deltas for n in delta.buffers_left_out if n not in buffers))
    selection = Selection(weights, tuple(dense), description={"scorer": f"{len(deltas)} deltas merged"})
    return Delta(selection, values, dense, deltas[0].base, package_versions(), buffers, left_out), conflicts


def _merged_buffer(name: str, parts: list[Tensor], on_conflict: str) -> tuple[Tensor, Conflict | None]:
    if len({(b.dtype, b.shape) for b in parts}) > 1:
        raise ValueError(f"the deltas are of different models: the buffer {name} has several shapes or dtypes")
    if all(same_bits(parts[0], b) for b in parts[1:]):
        return parts[0].clone(), None
    if on_conflict not in ("first", "last"):
        raise ValueError(
            f"the buffer {name} has different values in several deltas, and buffers have no mean: choose "
            "on_conflict='first' or 'last', or take them out of all but one with delta.buffers.clear()"
        )
    every = torch.stack(parts).double()
    apart = every.amax(0) - every.amin(0)
    return parts[0 if on_conflict == "first" else -1].clone(), Conflict(name, int((apart != 0).sum()), float(apart.max()))


def _merged(
    name: str, parts: list[tuple[WeightSelection | None, Tensor]], on_conflict: str
) -> tuple[Tensor | tuple[WeightSelection, Tensor], Conflict | None]:
    shapes = {tuple(v.shape) if w is None else w.layout.parameter_shape for w, v in parts}
    layouts = {w.layout for w, _ in parts if w is not None}
    if len(shapes) > 1 or len(layouts) > 1:
        raise ValueError(f"the deltas are of different models: {name} has several shapes")
    layout = layouts.pop() if layouts else MatrixLayout(shapes.pop())
    flat = torch.cat([_flat(w, v, layout) for w, v in parts])
    owner = torch.cat([torch.full((v.numel(),), i, device="cpu") for i, (_, v) in enumerate(parts)])
    every = torch.cat([(layout.matrix(v).reshape(-1) if w is None else v).float() for w, v in parts])
    order = (flat * len(parts) + owner).argsort()  # by entry, and there in the order of the deltas
    flat, every = flat[order], every[order]
    entries, group, counts = flat.unique_consecutive(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    first, last = every[ends - counts], every[ends - 1]
    lowest = torch.zeros(entries.numel(), device="cpu").scatter_reduce_(0, group, every, "amin", include_self=False)
    highest = torch.zeros(entries.numel(), device="cpu").scatter_reduce_(0, group, every, "amax", include_self=False)
    differs = (lowest != highest) & ~(lowest.isnan() & highest.isnan() & first.isnan() & last.isnan())
    conflict = None
    if bool(differs.any()):
        conflict = Conflict(name, int(differs.sum()), float((highest - lowest)[differs].max()))
        if on_conflict == "error":
            raise ValueError(
                f"{conflict.entries} entries of {name} have different values in several deltas (by up to "
                f"{conflict.largest:.3g}): choose on_conflict='first', 'last' or 'mean'"
            )
    mean = torch.zeros(entries.numel(), device="cpu").index_add_(0, group, every) / counts
    merged = {"first": first, "last": last, "mean": torch.where(differs, mean, first), "error": first}[on_conflict]
    if any(w is None for w, _ in parts):
        O, C = layout.shape
        whole = torch.empty(O * C, device="cpu")
        whole[entries] = merged  # some delta has every entry
        return layout.unmatrix(whole.view(O, C)).contiguous(), conflict
    return (WeightSelection.from_flat(layout, entries), merged), conflict


def _flat(w: WeightSelection | None, values: Tensor, layout: MatrixLayout) -> Tensor:
    return torch.arange(values.numel(), device="cpu") if w is None else w.flat()
