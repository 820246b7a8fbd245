"""One forward pass over calibration data, and the sums that are left of it."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fps_kernels import ops
from fps_kernels.choosing.feeding import Forward, UnsupportedInputError, run_forward
from fps_kernels.choosing.statistics import ActivationStats, WeightStats, combine
from fps_kernels.weights.matrix import MatrixLayout, is_simulated
from fps_kernels.weights.survey import Survey
from fps_kernels.weights.watching import WeightUse

MAX_ROW_BLOCKS = 64


class _Accumulator:
    """Sums the uses of one weight: one vector for each range of rows that was multiplied as one."""

    def __init__(self, layout: MatrixLayout) -> None:
        self.layout = layout
        self.ranges: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self.calls = 0

    def add(self, use: WeightUse, ord: float) -> None:
        shape = use.kind.groups, self.layout.shape[1]
        norm, rows = self.ranges.get(use.rows) or (torch.zeros(shape, dtype=torch.float64, device=use.input.device), 0)
        use.kind.add_column_norms_(use.input, norm, ord)
        self.ranges[use.rows] = norm, rows + use.kind.input_rows(use.input)
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
                norms[i] = combine(norms[i], norm[0], ord)
                counts[i] += rows
        if not all(counts):
            return "some of its rows multiplied nothing"
        return WeightStats(self.layout, norms, tuple(counts), self.calls)


def calibrate(
    model: nn.Module | Survey,
    data: Iterable[Any],
    *,
    ord: float = 1,
    forward: Forward | None = None,
    micro_batch: int | None = None,
    max_batches: int | None = None,
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
    survey = Survey.of(model)
    accumulators: dict[str, _Accumulator] = {}

    def accumulate(use: WeightUse) -> None:
        accumulator = accumulators.setdefault(use.name, _Accumulator(use.layout))
        if accumulator.layout != use.layout:
            raise ValueError(f"{use.name} is used both as it is and transposed; leave one use out with forward=")
        try:
            accumulator.add(use, ord)
        except TypeError as error:
            raise UnsupportedInputError(f"the input of {use.name}: {error}") from error

    other_uses = run_forward(
        survey,
        data,
        accumulate,
        forward=forward,
        micro_batch=micro_batch,
        max_batches=max_batches,
        progress=progress,
    )
    weights: dict[str, WeightStats] = {}
    unused = {}
    for name, p in survey.matrices.items():
        accumulator = accumulators.get(name)
        stats = accumulator.finish(ord) if accumulator else survey.reason_unused(name, p, other_uses)
        if isinstance(stats, str):
            unused[name] = stats
        else:
            weights[name] = stats
    result = ActivationStats(float(ord), weights, unused, dict(survey.tied))
    _check_finite(result)
    return result


def _check_finite(stats: ActivationStats) -> None:
    sums = {name: s.norm.sum() for name, s in stats.weights.items() if not is_simulated(s.norm)}
    if sums and not all(torch.stack([s.cpu() for s in sums.values()]).isfinite().tolist()):
        bad = [name for name, s in sums.items() if not s.isfinite()]
        more = f" and {len(bad) - 1} more weights" if len(bad) > 1 else ""
        raise ValueError(
            f"the activations that reach {bad[0]}{more} contain NaN or Inf: check the data, or the precision of the forward"
        )
