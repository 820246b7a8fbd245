"""One forward pass over calibration data: how strongly each column of each weight is driven."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn

from fps_kernels import ops
from fps_kernels.choosing.feeding import Forward, UnsupportedInputError, matrix_parameters, run_forward
from fps_kernels.storage.checked_file import distrusted, read, texts_by_name, whole_number, whole_numbers, write
from fps_kernels.weights.matrix import MatrixLayout, is_simulated
from fps_kernels.weights.watching import Convolution, WeightUse

_FORMAT = "fps_kernels.statistics.1"
MAX_ROW_BLOCKS = 64


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

    def mean(self) -> Tensor:
        """``norm / rows`` ``[G, C]`` float64: the mean magnitude for ``ord=1``."""
        return self.norm / torch.tensor(self.rows, dtype=torch.float64, device=self.norm.device).unsqueeze(1)


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
            norm = _combine(a.norm, b.norm.to(a.norm.device), self.ord)
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
            name: [list(stats.layout.parameter_shape), stats.layout.transposed, list(stats.rows), stats.calls]
            for name, stats in self.weights.items()
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
            for name, (shape, transposed, rows, calls) in content["weights"].items():
                layout, norm = MatrixLayout.described(shape, transposed), tensors[name]
                counts = whole_numbers(rows)
                if norm.dtype != torch.float64 or norm.shape != (len(counts), layout.shape[1]):
                    raise ValueError(f"{name} has norms of {norm.dtype} {list(norm.shape)} for {layout.shape[1]} columns")
                weights[name] = WeightStats(layout, norm.to(device), counts, whole_number(calls))
            return cls(ord, weights, texts_by_name(content["unused"]), texts_by_name(content["tied"]))


def _combine(a: Tensor, b: Tensor, ord: float) -> Tensor:
    return torch.maximum(a, b) if ord == math.inf else a + b


def _with_blocks(stats: WeightStats, blocks: int) -> WeightStats:
    repeat = blocks // len(stats.norm)
    rows = tuple(count for count in stats.rows for _ in range(repeat))
    return WeightStats(stats.layout, stats.norm.repeat_interleave(repeat, 0), rows, stats.calls)


class _Accumulator:
    """Sums the uses of one weight: one vector for each range of rows that was multiplied as one."""

    def __init__(self, layout: MatrixLayout) -> None:
        self.layout = layout
        self.ranges: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self.calls = 0

    def add(self, use: WeightUse, ord: float) -> None:
        groups = use.convolution.groups if use.convolution else 1
        columns = self.layout.shape[1]
        norm, rows = self.ranges.get(use.rows) or (
            torch.zeros(groups, columns, dtype=torch.float64, device=use.input.device),
            0,
        )
        if use.convolution is None:
            ops.column_norm_(use.input, norm.view(-1), ord)
            rows += use.input.numel() // columns if columns else 0
        else:
            c = use.convolution
            ops.column_norm_conv2d_(use.input, norm, c.kernel_size, c.stride, c.padding, c.dilation, groups, ord)
            rows += _output_positions(use.input, c)
        self.ranges[use.rows] = norm, rows
        self.calls += 1

    def finish(self, ord: float) -> WeightStats | str:
        """The statistics, or why this weight has none."""
        O, C = self.layout.shape
        if not any(rows for _, rows in self.ranges.values()):
            return "all its inputs were empty"
        if set(self.ranges) == {(0, O)}:
            norm, rows = self.ranges[0, O]
            return WeightStats(self.layout, norm, (rows,) * len(norm), self.calls)
        if any(len(norm) > 1 for norm, _ in self.ranges.values()):
            return "only some groups of its convolution were used"
        block = math.gcd(O, *(edge for edges in self.ranges for edge in edges))
        blocks = O // block
        if blocks > MAX_ROW_BLOCKS:
            return f"it is used through {len(self.ranges)} slices of unequal sizes"
        first = next(iter(self.ranges.values()))[0]
        norms = torch.zeros(blocks, C, dtype=torch.float64, device=first.device)
        counts = [0] * blocks
        for (start, stop), (norm, rows) in self.ranges.items():
            for i in range(start // block, stop // block):
                norms[i] = _combine(norms[i], norm[0], ord)
                counts[i] += rows
        if not all(counts):
            return "some of its rows multiplied nothing"
        return WeightStats(self.layout, norms, tuple(counts), self.calls)


def _output_positions(x: Tensor, c: Convolution) -> int:
    positions = x.shape[0]
    for size, pad, kernel, spread, stride in (
        (x.shape[2], c.padding[0] + c.padding[1], c.kernel_size[0], c.dilation[0], c.stride[0]),
        (x.shape[3], c.padding[2] + c.padding[3], c.kernel_size[1], c.dilation[1], c.stride[1]),
    ):
        positions *= (size + pad - spread * (kernel - 1) - 1) // stride + 1
    return int(positions)


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    ord: float = 1,
    forward: Forward | None = None,
    micro_batch: int | None = None,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> ActivationStats:
    """Run the model forward over the data once and sum the column norms of every weight's input.

    Nothing is hooked and no module needs to be known: see :mod:`fps_kernels.interception`. The pass runs without
    gradients and in evaluation mode; the mode of every module is put back afterwards. Beside the forward it holds one
    float64 vector per weight. Wrap the call in ``torch.autocast`` to run it in lower precision.

    Args:
        model: any module whose parameters hold values.
        data: batches: tensors (``model(batch)``), tuples or lists whose first item is the input (``model(batch[0])``, as
            in ``(input, target)``), or mappings of keyword arguments (``model(**batch)``).
        ord: 1 sums magnitudes (FPS), 2 sums squares (Wanda), ``inf`` keeps the largest magnitude.
        forward: ``forward(model, batch)`` runs a batch your way instead.
        micro_batch: split every batch into pieces of this many samples, to bound memory. Sums do not change beyond
            rounding. The first tensor of a batch tells how many samples it has; every tensor whose first dimension is
            that long is split.
        max_batches: stop after so many batches.
        progress: show a progress bar; ``None`` shows it on a terminal.

    Returns:
        :class:`ActivationStats` on the devices of the weights.

    Raises:
        ValueError: no data, a batch that the model cannot take, parameters without values, activations with NaN or Inf.
        TypeError: ``data`` that is a single batch, or activations of a dtype other than float32, bfloat16 and float16.

    Example:
        >>> stats = fps.calibrate(model, loader, micro_batch=8)
        >>> selection = fps.select(model, stats=stats, budget=fps.PerNeuron(4))
    """
    if ord not in ops.ORDS:
        raise ValueError(f"ord must be 1, 2 or inf, got {ord}")
    accumulators: dict[str, _Accumulator] = {}

    def accumulate(use: WeightUse) -> None:
        accumulator = accumulators.setdefault(use.name, _Accumulator(use.layout))
        if accumulator.layout != use.layout:
            raise ValueError(f"{use.name} is used both as it is and transposed; leave one use out with forward=")
        try:
            accumulator.add(use, ord)
        except TypeError as error:
            raise UnsupportedInputError(f"the input of {use.name}: {error}") from error

    seen = run_forward(
        model,
        data,
        accumulate,
        forward=forward,
        micro_batch=micro_batch,
        max_batches=max_batches,
        progress=progress,
    )
    weights: dict[str, WeightStats] = {}
    unused = {}
    for name, p in matrix_parameters(model).items():
        accumulator = accumulators.get(name)
        stats = accumulator.finish(ord) if accumulator else seen.reason_unused(name, p)
        if isinstance(stats, str):
            unused[name] = stats
        else:
            weights[name] = stats
    result = ActivationStats(float(ord), weights, unused, tied_names(model))
    _check_finite(result)
    return result


def tied_names(model: nn.Module) -> dict[str, str]:
    """The first name of every shared parameter, by its other names."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def _check_finite(stats: ActivationStats) -> None:
    sums = {name: s.norm.sum() for name, s in stats.weights.items() if not is_simulated(s.norm)}
    if sums and not all(torch.stack([s.cpu() for s in sums.values()]).isfinite().tolist()):
        bad = [name for name, s in sums.items() if not s.isfinite()]
        more = f" and {len(bad) - 1} more weights" if len(bad) > 1 else ""
        raise ValueError(
            f"the activations that reach {bad[0]}{more} contain NaN or Inf: check the data, or the precision of the forward"
        )
