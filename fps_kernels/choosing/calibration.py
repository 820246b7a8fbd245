"""One forward pass over calibration data, and the sums that are left of it."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fps_kernels import ops
from fps_kernels.choosing.feeding import AT_ONCE, Forward, UnsupportedInputError, ordinary_tensors, run_forward
from fps_kernels.choosing.finite_checks import FiniteCheck, check_finite
from fps_kernels.choosing.statistics import ActivationStats, WeightStats, combine
from fps_kernels.ops import BackendUnavailableError, backend_for, native
from fps_kernels.weights.matrix import MatrixLayout, is_simulated
from fps_kernels.weights.sharding import check_sharding
from fps_kernels.weights.survey import Survey
from fps_kernels.weights.watching import WeightUse

MAX_ROW_BLOCKS = 64

_BOTH_WAYS = "{} is used both as it is and transposed, or reshaped; leave one use out with forward="


class _Sums:
    """Column norms ``[G, C]`` of the inputs of a range of rows, of how many rows, and in how many calls.

    Attributes:
        norm: for each of ``G`` equal blocks of the range.
        rows: activation rows that were summed, for each block or for all.
        calls: multiplications.
    """

    __slots__ = ("calls", "norm", "rows")

    def __init__(self, norm: Tensor) -> None:
        self.norm, self.calls = norm, 0
        self.rows: int | tuple[int, ...] = 0

    def add_rows(self, rows: int | tuple[int, ...]) -> None:
        if isinstance(rows, int) and isinstance(self.rows, int):
            self.rows += rows
        else:
            self.rows = tuple(
                a + b for a, b in zip(_each(self.rows, len(self.norm)), _each(rows, len(self.norm)), strict=True)
            )


def _each(rows: int | tuple[int, ...], blocks: int) -> tuple[int, ...]:
    return (rows,) * blocks if isinstance(rows, int) else rows


class _Accumulator:
    """Sums the uses of one weight: one vector for each range of rows that was multiplied as one."""

    __slots__ = ("layout", "ranges")

    def __init__(self, layout: MatrixLayout) -> None:
        self.layout = layout
        self.ranges: dict[tuple[int, int], _Sums | native.ColumnNorms] = {}

    def add(self, use: WeightUse, ord: float) -> None:
        groups = use.kind.groups
        sums = self.ranges.get(use.rows)
        if sums is None:
            shape = groups, self.layout.shape[1]
            sums = self.ranges[use.rows] = _Sums(torch.zeros(shape, dtype=torch.float64, device=use.input.device))
        if len(sums.norm) != groups:
            raise ValueError(
                f"{use.name} is used in {len(sums.norm)} groups and in {groups}; leave one use out with forward="
            )
        use.kind.add_column_norms_(use.input, sums.norm, ord)
        rows = use.kind.input_rows(use.input)
        if isinstance(sums, _Sums):
            sums.add_rows(rows)
        elif isinstance(rows, int):  # of a linear map
            sums.rows += rows
        sums.calls += 1

    def finish(self, ord: float) -> WeightStats | str:
        """The statistics, or why this weight has none."""
        O, C = self.layout.shape
        self.ranges = {rows: sums for rows, sums in self.ranges.items() if sums.calls}
        calls = sum(sums.calls for sums in self.ranges.values())
        counted = {rows: _each(sums.rows, len(sums.norm)) for rows, sums in self.ranges.items()}
        if not any(map(any, counted.values())):
            return "all its inputs were empty"
        if len(self.ranges) == 1 and (0, O) in self.ranges:
            return WeightStats(self.layout, self.ranges[0, O].norm, counted[0, O], calls)
        sizes = {(stop - start) // len(self.ranges[start, stop].norm) for start, stop in self.ranges}
        block = math.gcd(O, *(start for start, _ in self.ranges), *sizes)
        blocks = O // block
        if blocks > max(MAX_ROW_BLOCKS, 2 * len(self.ranges), self.layout.sizes[0] if self._is_stacked else 0):
            return f"it is used through {len(self.ranges)} slices of unequal sizes"
        first = next(iter(self.ranges.values())).norm
        norms = torch.zeros(blocks, C, dtype=torch.float64, device=first.device)
        counts = [0] * blocks
        for (start, stop), sums in self.ranges.items():
            repeat = (stop - start) // len(sums.norm) // block
            for i, (norm, rows) in enumerate(zip(sums.norm, counted[start, stop], strict=True)):
                for j in range(start // block + i * repeat, start // block + (i + 1) * repeat):
                    norms[j] = combine(norms[j], norm, ord)
                    counts[j] += rows
        # An expert that no token was sent to is one that may be used; any other row that multiplied nothing is not.
        if not all(counts) and not self._is_stacked and (len(sizes) > 1 or len(self.ranges) == 1):
            return "some of its rows multiplied nothing"
        return WeightStats(self.layout, norms, tuple(counts), calls)

    @property
    def _is_stacked(self) -> bool:
        """Whether it is several matrices, as the experts of a mixture."""
        return len(self.layout.row_dims) > 1


def calibrate(
    model: nn.Module | Survey,
    data: Iterable[Any],
    *,
    ord: float = 1,
    forward: Forward | None = None,
    micro_batch: int | None = None,
    max_batches: int | None = None,
    batches_at_once: int = AT_ONCE,
    progress: bool | None = None,
) -> ActivationStats:
    """Run the model forward over the data once and sum the column norms of every weight's input.

    Nothing is hooked and no module needs to be known: see :mod:`fps_kernels.weights.watching`. The pass runs without
    gradients and in evaluation mode; the mode of every module is put back afterwards. Beside the forward it holds one
    float64 vector per weight. Wrap the call in ``torch.autocast`` to run it in lower precision.

    Args:
        model: any module whose parameters hold values, or what was found by looking at it before.
        data: batches: tensors (``model(batch)``), tuples or lists whose first item is the input (``model(batch[0])``, as
            in ``(input, target)``), or mappings of keyword arguments (``model(**batch)``).
        ord: 1 sums magnitudes (FPS), 2 sums squares (Wanda), ``inf`` keeps the largest magnitude.
        forward: ``forward(model, batch)`` runs a batch your way instead.
        micro_batch: split every batch into pieces of this many samples, to bound memory. Sums do not change beyond
            rounding. The first tensor of a batch tells how many samples it has; every tensor whose first dimension is
            that long is split.
        max_batches: stop after so many batches.
        batches_at_once: of :func:`select`.
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
    with ordinary_tensors():
        survey = Survey.of(model)
        stats, checks = unchecked_statistics(
            survey, data, ord, forward, micro_batch, max_batches, progress, at_once=batches_at_once
        )
        check_finite(checks)
        return stats


def unchecked_statistics(
    survey: Survey,
    data: Iterable[Any],
    ord: float,
    forward: Forward | None,
    micro_batch: int | None,
    max_batches: int | None,
    progress: bool | None,
    on_complete: Callable[[str, WeightStats], None] | None = None,
    at_once: int = AT_ONCE,
) -> tuple[ActivationStats, list[FiniteCheck]]:
    """:func:`calibrate` without having looked whether activations were finite: whoever goes on looks at that later.

    Args:
        on_complete: of an offloaded model, told, while the last piece is fed, of each weight whose statistics are whole by
            then, unless it is used once more; the weight itself is still there.
        at_once: of :func:`run_forward`.
    """
    accumulators: dict[str, _Accumulator] = {}
    check_sharding(survey)
    survey.check_has_values()
    memory, direct = _direct_sums(survey, ord)

    def accumulate(use: WeightUse) -> None:
        accumulator = accumulators.get(use.name)
        if accumulator is None:
            accumulator = accumulators[use.name] = _Accumulator(use.layout)
            if use.name in direct and use.layout.row_dims == (0,):
                accumulator.ranges[0, use.layout.shape[0]] = direct[use.name]
        if accumulator.layout != use.layout or (
            use.layout.row_dims != (0,) and use.name in direct and direct[use.name].calls
        ):
            raise ValueError(_BOTH_WAYS.format(use.name))
        try:
            accumulator.add(use, ord)
        except TypeError as error:
            raise UnsupportedInputError(f"the input of {use.name}: {error}") from error
        if is_last and on_complete is not None and not isinstance(stats := accumulator.finish(ord), str):
            on_complete(use.name, stats)

    is_last = False

    def on_turn(last: bool) -> None:
        nonlocal is_last
        is_last = last

    uses = run_forward(
        survey,
        data,
        accumulate,
        takers={name: sums.add for name, sums in direct.items()},
        forward=forward,
        micro_batch=micro_batch,
        max_batches=max_batches,
        progress=progress,
        on_turn=on_turn,
        at_once=at_once,
    )
    weights: dict[str, WeightStats] = {}
    unused = {}
    for name, p in survey.matrices.items():
        accumulator, sums = accumulators.get(name), direct.get(name)
        stats: WeightStats | str
        if name in uses.hidden:
            stats = uses.why_hidden(name)
        elif accumulator is not None:
            if accumulator.layout.row_dims != (0,) and sums is not None and sums.calls:
                raise ValueError(_BOTH_WAYS.format(name))
            stats = accumulator.finish(ord)
        elif sums is not None and sums.calls:
            stats = WeightStats(MatrixLayout(tuple(p.shape)), sums.norm, (sums.rows,), sums.calls)
        else:
            stats = uses.transformed.get(name) or survey.reason_unused(name, p, uses.other_uses)
        if isinstance(stats, str):
            unused[name] = stats
        else:
            weights[name] = stats
    result = ActivationStats(float(ord), weights, unused, dict(survey.tied))
    return result, _checks(result, memory, direct)


def merged_statistics(stats: ActivationStats, group: Any) -> list[FiniteCheck]:
    """Merge the statistics of all processes of a group, in place, on each of them.

    What one process found to be NaN or infinite all of them have then, and refuse.
    """
    stats.all_reduce(group)
    return _checks(stats, None, {})


def _direct_sums(survey: Survey, ord: float) -> tuple[Tensor | None, dict[str, native.ColumnNorms]]:
    """What adds up the inputs of linear maps on the CPU, faster than an op, where the native backend serves them."""
    try:
        if backend_for("column_norm_", "cpu") != "native":
            return None, {}
    except BackendUnavailableError:  # said where there is an input that it cannot serve
        return None, {}
    matrices = {name: p for name, p in survey.matrices.items() if type(p) is nn.Parameter and p.is_cpu and p.dim() == 2}
    if not matrices:
        return None, {}
    memory, sums = native.column_norms([p.size(1) for p in matrices.values()], float(ord))
    return memory, dict(zip(matrices, sums, strict=True))


def _checks(stats: ActivationStats, memory: Tensor | None, direct: dict[str, native.ColumnNorms]) -> list[FiniteCheck]:
    norms: dict[torch.device, list[Tensor]] = {} if memory is None else {memory.device: [memory.view(-1)]}
    for name, s in stats.weights.items():
        if (name not in direct or direct[name].norm is not s.norm) and not is_simulated(s.norm):
            norms.setdefault(s.norm.device, []).append(s.norm.view(-1))
    # One look at each device. What is added up is not negative: nothing cancels out.
    sums = [(parts[0] if len(parts) == 1 else torch.cat(parts)).sum() for parts in norms.values()]
    return [FiniteCheck(total, partial(_refuse, stats)) for total in sums]


def _refuse(stats: ActivationStats) -> None:
    bad = [name for name, s in stats.weights.items() if not is_simulated(s.norm) and not s.norm.sum().isfinite()]
    if bad:
        more = f" and {len(bad) - 1} more weights" if len(bad) > 1 else ""
        raise ValueError(
            f"the activations that reach {bad[0]}{more} contain NaN or Inf: check the data, or the precision of the forward"
        )
