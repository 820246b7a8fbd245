"""How many entries, and who competes with whom. Counts are exact, always."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops.transfers import fetched
from fps_kernels.selection import WeightSelection, uniform_row_offsets
from fps_kernels.weights.matrix import MatrixLayout

T = TypeVar("T")


@dataclass(frozen=True)
class ScoredWeight:
    """A weight with its column factors, ready to choose from.

    Attributes:
        name: parameter name.
        layout: how the parameter is read as a matrix.
        values: the parameter, or what else in its shape is scored.
        factors: float32 ``[G, C]``.
        stays: the values are there until all is chosen, and not only until a choice from this one is made.
    """

    name: str
    layout: MatrixLayout
    values: Tensor
    factors: Tensor
    stays: bool = True

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Matrices of which the weight's is made, one below the other, with their factors.

        That is one, but for experts that are stacked in such an order that the whole would be a copy. Made when asked for,
        since a channels-last convolution is copied.
        """
        matrices = self.layout.matrices(self.values)
        if len(matrices) == 1:
            return [(matrices[0], self.factors)]
        factors = self.factors
        if len(factors) % len(matrices):
            factors = factors.repeat_interleave(math.lcm(len(factors), len(matrices)) // len(factors), 0)
        return list(zip(matrices, factors.chunk(len(matrices)), strict=True))


class Begun(NamedTuple):
    """A choice under way, for which the host may have to read numbers of the device.

    Attributes:
        unread: the tensors that it has to read.
        finish: makes the choice of these tensors, on the CPU.
    """

    unread: Sequence[Tensor]
    finish: Callable[[Sequence[Tensor]], dict[str, WeightSelection]]


class Budget(ABC):
    """How many entries of which weights.

    Attributes:
        competes: whether the entries of all weights compete with each other, so that all weights must be there at once.
    """

    competes: bool = False

    def groups(self, names: Iterable[T]) -> list[list[T]]:
        """Weights that compete, together: each alone, or all."""
        return [list(names)] if self.competes else [[name] for name in names]

    @abstractmethod
    def check(self, name: str, layout: MatrixLayout) -> None:
        """Refuse a weight that the budget does not fit.

        Raises:
            ValueError: with the weight's name.
        """

    def remark(self, layouts: dict[str, MatrixLayout]) -> str:
        """What there is to say of weights that the budget fits in a way of its own; nothing if there are none.

        Raises:
            ValueError: it fits none.
        """
        return ""

    @abstractmethod
    def choose(self, weights: list[ScoredWeight]) -> dict[str, WeightSelection]:
        """The best entries of a group of weights."""

    def begin(self, weights: list[ScoredWeight]) -> Begun:
        """:meth:`choose` up to where the host has to know something: so that it may ask for many groups at once."""
        chosen = self.choose(weights)
        return Begun((), lambda read: chosen)

    @abstractmethod
    def draw(self, layouts: dict[str, MatrixLayout], generator: torch.Generator) -> dict[str, WeightSelection]:
        """As many entries of a group of weights, drawn uniformly."""


def _check_density(density: float) -> None:
    if not isinstance(density, Real):
        raise TypeError(f"density must be a number, got {density!r}")
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")


def _count(density: float, entries: int) -> int:
    return max(1, min(entries, round(density * entries)))


@dataclass(frozen=True)
class PerNeuron(Budget):
    """The ``k`` best entries of every output neuron (row): ``k * O`` entries of each weight.

    A row of fewer than ``k`` columns, as in a depthwise convolution of 1×1, gives all that it has, and :func:`fps.select`
    says so once.

    Source: section 3.2 of GPS (Zhang et al., CVPR 2024), kept by FPS (arXiv 2510.27359).

    Attributes:
        k: entries per row, at least 1.

    Example:
        >>> selection = fps.select(model, loader, budget=fps.PerNeuron(4))
    """

    k: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.k, Integral) or isinstance(self.k, bool):
            raise TypeError(f"k must be an integer, got {self.k!r}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def check(self, name: str, layout: MatrixLayout) -> None:
        """Refuse weights of too many entries."""
        if self.k * layout.shape[0] > ops.MAX_NNZ:
            raise ValueError(f"k={self.k} for the {layout.shape[0]} rows of {name} is more than 2**31 - 1 entries")

    def remark(self, layouts: dict[str, MatrixLayout]) -> str:
        """Weights with fewer columns than ``k``; it is refused that all of them are."""
        most = max((layout.shape[1] for layout in layouts.values()), default=self.k)
        if most < self.k:
            raise ValueError(f"k={self.k} exceeds the {most} columns of the widest weight: choose a smaller k")
        narrow = [name for name, layout in layouts.items() if layout.shape[1] < self.k]
        return _narrow(narrow, f"fewer columns than k={self.k}: every row of theirs gives all that it has") if narrow else ""

    def choose(self, weights: list[ScoredWeight]) -> dict[str, WeightSelection]:
        """The best entries of every weight."""
        chosen = {}
        for w in weights:
            k = min(int(self.k), w.layout.shape[1])
            found = [ops.score_topk(matrix, factors, k) for matrix, factors in w.blocks()]
            columns = found[0] if len(found) == 1 else torch.cat(found)
            row_offsets = uniform_row_offsets(columns.shape[0], k, columns.device)
            chosen[w.name] = WeightSelection.trusted(w.layout, row_offsets, columns.flatten())
        return chosen

    def draw(self, layouts: dict[str, MatrixLayout], generator: torch.Generator) -> dict[str, WeightSelection]:
        """As many entries, drawn uniformly."""
        chosen = {}
        for name, layout in layouts.items():
            O, C = layout.shape
            k = min(int(self.k), C)
            rows_at_once = max(1, 2**22 // max(C, 1))  # bounds the scratch
            columns = [
                torch.rand(min(rows_at_once, O - start), C, generator=generator, device="cpu").topk(k, sorted=False).indices
                for start in range(0, O, rows_at_once)
            ]
            flat = torch.cat(columns).sort(1).values.int().flatten()
            chosen[name] = WeightSelection(layout, uniform_row_offsets(O, k), flat)
        return chosen


class Counted(Budget):
    """A number of entries of each group of weights, whatever their rows."""

    def check(self, name: str, layout: MatrixLayout) -> None:
        """Every weight will do."""

    @abstractmethod
    def count_of(self, layouts: Sequence[MatrixLayout]) -> int:
        """How many entries of a group of weights."""


class _EachWeight(Counted):
    """Every weight has a number of entries of its own, which compete within it."""

    @abstractmethod
    def count(self, layout: MatrixLayout) -> int:
        """How many entries of a weight."""

    def count_of(self, layouts: Sequence[MatrixLayout]) -> int:
        """Of the one weight that a group is."""
        return sum(map(self.count, layouts))

    def choose(self, weights: list[ScoredWeight]) -> dict[str, WeightSelection]:
        """The best entries of every weight."""
        chosen = {}
        for w in weights:
            blocks, count = w.blocks(), self.count(w.layout)
            threshold, *counts = ops.score_kth([matrix for matrix, _ in blocks], [factors for _, factors in blocks], count)
            numbers = [count] if len(blocks) == 1 else _shares(count, *(c.tolist() for c in fetched(counts)))
            chosen[w.name] = _selected(w, blocks, threshold, numbers)
        return chosen

    def draw(self, layouts: dict[str, MatrixLayout], generator: torch.Generator) -> dict[str, WeightSelection]:
        """As many entries, drawn uniformly."""
        return {
            name: WeightSelection.from_flat(
                layout, _draw_distinct(layout.shape[0] * layout.shape[1], self.count(layout), generator)
            )
            for name, layout in layouts.items()
        }


@dataclass(frozen=True)
class PerTensor(_EachWeight):
    """The best ``density`` of the entries of each weight: ``round(density * entries)``, at least one.

    Attributes:
        density: share of the entries, in (0, 1].

    Example:
        >>> selection = fps.select(model, loader, budget=fps.PerTensor(0.01))
    """

    density: float

    def __post_init__(self) -> None:
        _check_density(self.density)

    def count(self, layout: MatrixLayout) -> int:
        return _count(self.density, layout.shape[0] * layout.shape[1])


@dataclass(frozen=True)
class LikeLoRA(_EachWeight):
    """As many entries of each weight as LoRA of some rank has numbers there: ``rank * (O + C)``.

    The budget for comparisons at equal size, and that of SHiRA (Bhardwaj et al., NeurIPS 2024) as PEFT has it.

    Attributes:
        rank: of the LoRA, at least 1. A weight of fewer entries than ``rank * (O + C)`` gives all, and :func:`fps.select`
            says so.

    Example:
        >>> selection = fps.select(model, loader, budget=fps.LikeLoRA(8), include="blocks.*")
    """

    rank: int

    def __post_init__(self) -> None:
        if not isinstance(self.rank, Integral) or isinstance(self.rank, bool):
            raise TypeError(f"rank must be an integer, got {self.rank!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def count(self, layout: MatrixLayout) -> int:
        O, C = layout.shape
        return min(int(self.rank) * (O + C), O * C)

    def remark(self, layouts: dict[str, MatrixLayout]) -> str:
        """Weights that are smaller than their LoRA."""
        small = [name for name, layout in layouts.items() if int(self.rank) * sum(layout.shape) > math.prod(layout.shape)]
        return (
            _narrow(small, f"fewer entries than LoRA of rank {self.rank} has numbers there: all are chosen") if small else ""
        )


@dataclass(frozen=True)
class Global(Counted):
    """The best ``density`` of the entries of all weights together: ``round(density * entries)``, at least one.

    Attributes:
        density: share of the entries, in (0, 1].

    Example:
        >>> selection = fps.select(model, loader, budget=fps.Global(0.01))
    """

    density: float
    competes = True

    def __post_init__(self) -> None:
        _check_density(self.density)

    def count_of(self, layouts: Sequence[MatrixLayout]) -> int:
        """Of all weights together."""
        return _count(self.density, sum(math.prod(layout.shape) for layout in layouts))

    def choose(self, weights: list[ScoredWeight]) -> dict[str, WeightSelection]:
        """The best entries of all weights together; equal scores go to the earlier entry."""
        begun = self.begin(weights)
        return begun.finish(fetched(begun.unread))

    def begin(self, weights: list[ScoredWeight]) -> Begun:
        """The threshold; how many entries of a weight lie above it is not known yet."""
        devices = {str(w.values.device) for w in weights}
        if len(devices) > 1:
            raise ValueError(
                f"a Global budget compares all weights, which lie on {', '.join(sorted(devices))}: use PerTensor or "
                "PerNeuron, or bring the model to one device"
            )
        every = [w.blocks() for w in weights]
        blocks = [block for own in every for block in own]
        count = _count(self.density, sum(w.values.numel() for w in weights))
        threshold, greater, equal = ops.score_kth([m for m, _ in blocks], [factors for _, factors in blocks], count)
        held = every if threshold.is_cpu else None  # copies of channels-last weights, of which a GPU would hold many
        lengths = [len(own) for own in every]
        del every, blocks

        def finish(read: Sequence[Tensor]) -> dict[str, WeightSelection]:
            numbers = iter(_shares(count, *(counts.tolist() for counts in read)))
            return {
                w.name: _selected(
                    w, w.blocks() if held is None else held[i], threshold, [next(numbers) for _ in range(length)]
                )
                for i, (w, length) in enumerate(zip(weights, lengths, strict=True))
            }

        return Begun((greater, equal), finish)

    def draw(self, layouts: dict[str, MatrixLayout], generator: torch.Generator) -> dict[str, WeightSelection]:
        """As many entries, drawn uniformly."""
        sizes = torch.tensor([layout.shape[0] * layout.shape[1] for layout in layouts.values()], device="cpu")
        total = int(sizes.sum())
        flat = _draw_distinct(total, _count(self.density, total), generator)
        ends = sizes.cumsum(0)
        parts = torch.tensor_split(flat, torch.searchsorted(flat, ends[:-1]).tolist())
        return {
            name: WeightSelection.from_flat(layout, part - (end - size))
            for (name, layout), part, end, size in zip(layouts.items(), parts, ends, sizes, strict=True)
        }


def _narrow(names: list[str], what: str) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} weight{'s' * (len(names) > 1)} ({shown}) {'have' if len(names) > 1 else 'has'} {what}"


def _shares(count: int, above: list[int], equal: list[int]) -> list[int]:
    """How many of ``count`` entries each matrix gets: those above the threshold, and the rest of the first equal to it."""
    left, shares = count - sum(above), []
    for n_above, n_equal in zip(above, equal, strict=True):
        ties = min(left, n_equal)
        left -= ties
        shares.append(n_above + ties)
    return shares


def _selected(
    w: ScoredWeight, blocks: list[tuple[Tensor, Tensor]], threshold: Tensor, numbers: list[int]
) -> WeightSelection:
    """So many entries of each matrix of a weight, by the threshold."""
    return stacked(
        w.layout, [ops.score_select(*block, threshold, number) for block, number in zip(blocks, numbers, strict=True)]
    )


def stacked(layout: MatrixLayout, found: list[tuple[Tensor, Tensor]]) -> WeightSelection:
    """A selection of matrices, one below the other, of the ``row_offsets`` and columns of each."""
    if len(found) == 1:
        return WeightSelection.trusted(layout, *found[0])
    before = itertools.accumulate((columns.numel() for _, columns in found), initial=0)
    offsets = [row_offsets[i > 0 :] + begin for i, ((row_offsets, _), begin) in enumerate(zip(found, before, strict=False))]
    return WeightSelection.trusted(layout, torch.cat(offsets), torch.cat([columns for _, columns in found]))


def check_budget(budget: Any) -> None:
    """Refuse what is no budget."""
    if not isinstance(budget, Budget):
        raise TypeError(f"budget must be PerNeuron, PerTensor, LikeLoRA or Global, got {budget!r}")


def _draw_distinct(total: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` distinct numbers below ``total``, uniformly, ascending, in memory proportional to ``count``."""
    if count > total // 2:  # draw those to leave out instead
        kept = torch.ones(total, dtype=torch.bool, device="cpu")
        kept[_draw_distinct(total, total - count, generator)] = False
        return kept.nonzero().squeeze(1)
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while drawn.numel() < count:
        number = count - drawn.numel() + 16 + count // 64
        more = torch.randint(total, (number,), generator=generator, device="cpu")
        drawn = torch.cat([drawn, more]).unique()
    surplus = torch.randperm(drawn.numel(), generator=generator, device="cpu")[:count]
    return drawn[surplus].sort().values
