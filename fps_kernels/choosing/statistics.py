"""How strongly each column of each weight is driven: what a calibration pass finds."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor

from fps_kernels import ops
from fps_kernels.storage.checked_file import distrusted, read, texts_by_name, whole_number, whole_numbers, write
from fps_kernels.weights.matrix import MatrixLayout

_FORMAT = "fps_kernels.statistics.1"


@dataclass
class WeightStats:
    """What one weight's inputs looked like.

    Attributes:
        layout: how the parameter is read as a matrix ``[O, C]``.
        norm: float64 ``[G, C]``: per column the sum of ``|x|`` (``ord=1``), of ``x**2`` (2) or the largest ``|x|`` (inf),
            for each of ``G`` equal blocks of output rows.
        rows: activation rows summed, for each of the ``G`` blocks.
        calls: multiplications by this weight that were seen.
    """

    layout: MatrixLayout
    norm: Tensor
    rows: tuple[int, ...]
    calls: int

    @property
    def unseen(self) -> int:
        """Blocks whose rows multiplied nothing: experts of a mixture to which no token was sent."""
        return sum(not count for count in self.rows)

    def filled(self, ord: float) -> "WeightStats":
        """With what the other blocks saw on average in place of what a block did not see.

        An expert that calibration sent no token to is scored as if it had seen the mean of what the others saw: it is a
        weight as good as theirs, and some data will be sent to it.

        Args:
            ord: of the norms.
        """
        if not self.unseen or self.unseen == len(self.rows):
            return self
        seen = [i for i, count in enumerate(self.rows) if count]
        norms = self.norm[seen]
        mean = norms.amax(0) if ord == math.inf else norms.sum(0) / len(seen)
        rows = max(1, round(sum(self.rows) / len(seen)))
        norm = self.norm.clone()
        norm[[i for i, count in enumerate(self.rows) if not count]] = mean
        return WeightStats(self.layout, norm, tuple(count or rows for count in self.rows), self.calls)

    def mean(self) -> Tensor:
        """``norm / rows`` ``[G, C]`` float64: the mean magnitude for ``ord=1``."""
        # Filled where it is used: a copy of a list would let the host wait for a GPU, and to divide by a plain number is,
        # there, to multiply by its inverse.
        counts = [self.norm.new_full((1, 1), count, dtype=torch.float64) for count in dict.fromkeys(self.rows)]
        if len(counts) == 1:
            return self.norm / counts[0]
        number = dict(zip(dict.fromkeys(self.rows), counts, strict=True))
        return self.norm / torch.cat([number[count] for count in self.rows])


@dataclass
class ActivationStats(Mapping[str, WeightStats]):
    """Column statistics of every weight that a model multiplied with, by parameter name; adds up over passes.

    Attributes:
        ord: 1, 2 or ``inf``: which norm.
        weights: statistics by parameter name.
        unused: for every other parameter with two or more dimensions, why it has no statistics.
        tied: other names of shared parameters, by alias.

    Example:
        >>> stats = fps.calibrate(model, loader)
        >>> stats["blocks.0.attn.qkv.weight"].mean()
        >>> stats.save("stats.safetensors")
    """

    ord: float
    weights: dict[str, WeightStats]
    unused: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> WeightStats:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        return f"ActivationStats(ord={self.ord}, weights={len(self.weights)}, unused={len(self.unused)})"

    def filled(self) -> Self:
        """With what :meth:`WeightStats.filled` puts in place of what blocks did not see."""
        weights = {name: stats.filled(self.ord) for name, stats in self.weights.items()}
        return type(self)(self.ord, weights, self.unused, self.tied)

    def merge(self, other: Self) -> Self:
        """Statistics of both passes together, as if one pass had seen all the data.

        Args:
            other: statistics of the same model with the same ``ord``.

        Raises:
            ValueError: the two differ in ``ord`` or in their weights.
        """
        if self.ord != other.ord:
            raise ValueError(f"other has ord={other.ord}, expected ord={self.ord}")
        if different := self._names() ^ other._names():
            raise ValueError(f"other covers different weights, first {min(different)!r}: are both of the same model?")
        merged = {**self.weights, **other.weights}
        for name in self.weights.keys() & other.weights.keys():
            mine, theirs = self.weights[name], other.weights[name]
            if mine.layout != theirs.layout:
                raise ValueError(f"{name}: other has {theirs.layout}, expected {mine.layout}")
            blocks = math.lcm(len(mine.norm), len(theirs.norm))
            a, b = _with_blocks(mine, blocks), _with_blocks(theirs, blocks)
            norm = combine(a.norm, b.norm.to(a.norm.device), self.ord)
            rows = tuple(m + t for m, t in zip(a.rows, b.rows, strict=True))
            merged[name] = WeightStats(mine.layout, norm, rows, mine.calls + theirs.calls)
        unused = {name: reason for name, reason in self.unused.items() if name not in merged}
        return type(self)(self.ord, merged, unused, dict(self.tied))

    def _names(self) -> set[str]:
        return {*self.weights, *self.unused}

    def all_reduce(self, group: Any = None) -> None:
        """Merge the statistics of all processes of a ``torch.distributed`` group, in place, on each of them.

        A weight that only some processes used, as an expert of a mixture, counts with what those saw.

        Args:
            group: the process group; the default one if ``None``.

        Raises:
            ValueError: on every process, if they differ in ``ord`` or in their weights.
        """
        mine = {name: (stats.layout, len(stats.norm)) for name, stats in self.weights.items()}
        everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(everyone, (self.ord, self._names(), mine), group=group)
        layouts: dict[str, MatrixLayout] = {}
        blocks: dict[str, int] = {}
        for rank, (ord, names, theirs) in enumerate(everyone):
            if (ord, names) != everyone[0][:2]:
                raise ValueError(f"process {rank} has statistics of another ord or model than process 0")
            for name, (layout, count) in theirs.items():
                if layouts.setdefault(name, layout) != layout:
                    raise ValueError(f"{name}: process {rank} has {layout}, expected {layouts[name]}")
                blocks[name] = math.lcm(blocks.get(name, 1), count)
        device = next((stats.norm.device for stats in self.weights.values()), None)
        operation = torch.distributed.ReduceOp.MAX if self.ord == math.inf else torch.distributed.ReduceOp.SUM
        reduced = {}
        for name, layout in layouts.items():
            stats = self.weights.get(name)
            if stats is None:
                silent = torch.zeros(1, layout.shape[1], dtype=torch.float64, device=device)
                stats = WeightStats(layout, silent, (0,), 0)
            stats = _with_blocks(stats, blocks[name])
            counts = torch.tensor([*stats.rows, stats.calls], device=stats.norm.device)
            torch.distributed.all_reduce(stats.norm, operation, group=group)
            torch.distributed.all_reduce(counts, group=group)
            *rows, calls = counts.tolist()
            reduced[name] = WeightStats(layout, stats.norm, tuple(rows), calls)
        self.weights = reduced
        self.unused = {name: reason for name, reason in self.unused.items() if name not in reduced}

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a safetensors file, at once: whoever is killed meanwhile leaves what was there before."""
        tensors = {name: stats.norm.to("cpu", copy=True) for name, stats in self.weights.items()}
        described = {
            name: [stats.layout.description(), list(stats.rows), stats.calls] for name, stats in self.weights.items()
        }
        content = {"ord": str(self.ord), "weights": described, "unused": self.unused, "tied": self.tied}
        write(path, _FORMAT, content, tensors)

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            ValueError: the file holds something else, is cut off or was changed.
            OSError: it cannot be read.
        """
        content, tensors = read(path, _FORMAT, "activation statistics")
        with distrusted(path):
            ord, weights = float(content["ord"]), {}
            if ord not in ops.ORDS:
                raise ValueError(f"its ord is {ord}")
            for name, (layout_, rows, calls) in content["weights"].items():
                layout, norm = MatrixLayout.described(layout_), tensors[name]
                counts = whole_numbers(rows)
                if norm.dtype != torch.float64 or norm.shape != (len(counts), layout.shape[1]):
                    raise ValueError(f"{name} has norms of {norm.dtype} {list(norm.shape)} for {layout.shape[1]} columns")
                weights[name] = WeightStats(layout, norm.to(device), counts, whole_number(calls))
            return cls(ord, weights, texts_by_name(content["unused"]), texts_by_name(content["tied"]))


def combine(a: Tensor, b: Tensor, ord: float) -> Tensor:
    return torch.maximum(a, b) if ord == math.inf else a + b


def _with_blocks(stats: WeightStats, blocks: int) -> WeightStats:
    repeat = blocks // len(stats.norm)
    rows = tuple(count for count in stats.rows for _ in range(repeat))
    return WeightStats(stats.layout, stats.norm.repeat_interleave(repeat, 0), rows, stats.calls)
