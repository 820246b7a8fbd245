"""Choosing from weights that ``fully_shard`` has cut: the same choice as one process makes, on every process.

A process scores what it has. Where entries compete beyond that, the threshold is found together: of the processes' own
``k / world``-th scores the lowest is not above it and the highest not below, and between these two counts of all processes
halve the range of bits until one score is left. Entries equal to it go to the first weight, and in it to the first rows, as
in one process. No scores are kept or sent, but of rows that are cut in the middle: every process sends its ``k`` best there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fps_kernels import ops
from fps_kernels.choosing.best_entries import refuse_scores
from fps_kernels.choosing.budgets import Budget, Counted, PerNeuron, stacked
from fps_kernels.selection import WeightSelection, row_offsets_of, uniform_row_offsets
from fps_kernels.weights.exchange import all_gathered
from fps_kernels.weights.matrix import MatrixLayout
from fps_kernels.weights.shards import Piece, Shard

_NAN_KEY = 0x7F800001  # of every NaN; one above infinity's


@dataclass(frozen=True)
class _Held:
    """What this process has of a weight, as matrices one below the other with their factors."""

    name: str
    layout: MatrixLayout
    piece: Piece
    matrices: list[tuple[Tensor, Tensor]]

    @property
    def by_rows(self) -> bool:
        """Whether rows are whole."""
        return self.piece.columns == (0, self.layout.shape[1])


def sharded_entries(
    layouts: Mapping[str, MatrixLayout], shards: Mapping[str, Shard], factors: Mapping[str, Tensor], budget: Budget
) -> dict[str, WeightSelection]:
    """The best entries within a budget, the same on all processes, which all have to call this.

    Args:
        layouts: of the weights to choose from, by name.
        shards: what this process has of each.
        factors: of each, float32 ``[G, C]``, the same on all processes.
        budget: how many entries.

    Raises:
        ValueError: a score that is NaN or infinite, with the name of its weight: on every process.
    """
    world = _World(next(iter(shards.values())))
    with torch.device("cpu"):  # also where another is the default one
        held = [_held(name, layout, shards[name], factors[name]) for name, layout in layouts.items()]
        if isinstance(budget, PerNeuron):
            own = {h.name: _best_of_rows(h, int(budget.k), world) for h in held}
        else:
            assert isinstance(budget, Counted)
            own = _best_of_groups(budget.groups(held), budget, world)
        _check_finite(held, own, factors, world)
        return _whole(held, own, shards, world)


class _World:
    """The processes that have the pieces."""

    def __init__(self, shard: Shard) -> None:
        self.group, self.rank, self.size, self.device = shard.group, shard.rank, len(shard.bounds), shard.device

    def reduced(self, numbers: Tensor, operation: Any) -> Tensor:
        """Numbers of all processes, reduced, on the CPU."""
        there = numbers.to(self.device, copy=True)
        dist.all_reduce(there, operation, group=self.group)
        return there.cpu()

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """One-dimensional tensors of all processes, of any lengths, on the CPU."""
        return [part.cpu() for part in all_gathered(tensor.to(self.device), self.group)]


def _held(name: str, layout: MatrixLayout, shard: Shard, factors: Tensor) -> _Held:
    piece = shard.piece(layout)
    local = shard.local
    factors = factors.to(local.device, torch.float32)[:, piece.columns[0] : piece.columns[1]].contiguous()
    rows_per_factor = layout.shape[0] // len(factors)
    matrices = []
    begin = piece.rows[0]
    for block in piece.layout.matrices(local):
        end = begin + len(block)
        while begin < end:  # up to where other factors begin
            stop = min(end, (begin // rows_per_factor + 1) * rows_per_factor)
            if block.shape[1]:
                part = block[len(block) - (end - begin) :][: stop - begin]
                matrices.append((part, factors[begin // rows_per_factor : begin // rows_per_factor + 1]))
            begin = stop
    return _Held(name, layout, piece, matrices)


# ------------------------------------------------------------------------------------------------ so many of each row


def _best_of_rows(h: _Held, k: int, world: _World) -> WeightSelection:
    """The ``k`` best of the rows that are here; of rows that are cut, this process's share of them."""
    rows, width = h.piece.layout.shape
    k, here = min(k, h.layout.shape[1]), min(k, width)
    found = [ops.score_topk(matrix, factors, here) for matrix, factors in h.matrices] if here else []
    columns = torch.cat(found) if found else torch.empty(rows if here == 0 else 0, here, dtype=torch.int32)
    if h.by_rows:
        return WeightSelection.trusted(h.piece.layout, uniform_row_offsets(rows, here, columns.device), columns.flatten())
    scores = torch.full((rows, k), -1.0)
    if here:
        parts = [
            (matrix.gather(1, best.long()).float() * factors[0][best.long()]).abs()
            for (matrix, factors), best in zip(h.matrices, found, strict=True)
        ]
        scores[:, :here] = torch.cat(parts).cpu()
    everyone = torch.cat([part.view(rows, k) for part in world.gathered(scores.flatten())], 1)
    # Columns ascend from process to process and within each, so that of equal scores the first column comes first.
    best = everyone.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, best, True)
    mine = chosen[:, world.rank * k : world.rank * k + here].to(columns.device)
    return WeightSelection.trusted(h.piece.layout, row_offsets_of(mine.sum(1)), columns[mine])


# ------------------------------------------------------------------------------------------------ so many of a group


def _best_of_groups(groups: list[list[_Held]], budget: Counted, world: _World) -> dict[str, WeightSelection]:
    counts = [budget.count_of([h.layout for h in group]) for group in groups]
    every = [(number, h) for number, group in enumerate(groups) for h in group]
    matrices = [pair for _, h in every for pair in h.matrices]
    of_group = [number for number, h in every for _ in h.matrices]
    keys = _thresholds(matrices, of_group, counts, world)
    found = _counts(matrices, keys[of_group])
    own = [  # of each weight, how many scores of each of its matrices lie above the threshold and are equal to it
        list(zip(*(part.tolist() for part in parts), strict=True))
        for parts in zip(*(part.split([len(h.matrices) for _, h in every]) for part in found), strict=True)
    ]
    sums = torch.tensor([[sum(n[0] for n in numbers), sum(n[1] for n in numbers)] for numbers in own])
    everyone = torch.stack([part.view(-1, 2) for part in world.gathered(sums.flatten())])  # [world, weights, 2]
    left = list(counts)
    for (group, _), above in zip(every, everyone[:, :, 0].sum(0).tolist(), strict=True):
        left[group] -= above
    chosen = {}
    for (group, h), numbers, ties in zip(every, own, everyone[:, :, 1].t(), strict=True):
        threshold = _scores_of(keys[group : group + 1])[0]
        way = _in_order if h.by_rows else partial(_by_rows, h, threshold, numbers, world)
        shares = way(ties.tolist(), left[group])
        left[group] -= sum(shares)
        chosen[h.name] = _taken(h, threshold, numbers, shares[world.rank])
    return chosen


def _taken(h: _Held, threshold: Tensor, numbers: list[tuple[int, int]], ties: int) -> WeightSelection:
    """What lies above the threshold, and the first entries equal to it."""
    found = []
    for (matrix, factors), (above, equal) in zip(h.matrices, numbers, strict=True):
        share = min(ties, equal)
        ties -= share
        found.append(ops.score_select(matrix, factors, threshold.to(matrix.device), above + share))
    if not found:  # this process has nothing of it
        rows = h.piece.layout.shape[0]
        found = [(torch.zeros(rows + 1, dtype=torch.int32), torch.empty(0, dtype=torch.int32))]
    return stacked(h.piece.layout, found)


def _thresholds(matrices: list[tuple[Tensor, Tensor]], of_group: list[int], counts: list[int], world: _World) -> Tensor:
    """The bits of the ``counts[g]``-th largest score of each group, int64 on the CPU."""
    mine = torch.zeros(len(counts), dtype=torch.int64)
    for (matrix, _), g in zip(matrices, of_group, strict=True):
        mine[g] += matrix.numel()
    sizes = torch.stack(world.gathered(mine))  # [world, groups]
    low, high = torch.full_like(mine, _NAN_KEY), torch.zeros_like(mine)
    for g, count in enumerate(counts):
        share = _even_shares(sizes[:, g].tolist(), count)[world.rank]
        if mine[g]:
            members = [pair for pair, group in zip(matrices, of_group, strict=True) if group == g]
            kth = ops.score_kth([matrix for matrix, _ in members], [factors for _, factors in members], max(share, 1))[0]
            high[g] = _keys_of(kth.view(1).cpu())[0]
            low[g] = high[g] if share else _NAN_KEY
    # Each process has its share of scores from its own one on: at least the count lie from the lowest of these on, and
    # fewer above the highest.
    low, high = world.reduced(low, dist.ReduceOp.MIN), world.reduced(high, dist.ReduceOp.MAX)
    numbers = torch.tensor(of_group, dtype=torch.int64)
    wanted = torch.tensor(counts)
    while bool((low < high).any()):
        middle = (low + high + 1) // 2
        greater, equal = _counts(matrices, middle[numbers])
        reached = torch.zeros_like(middle).index_add_(0, numbers, greater + equal)
        enough = world.reduced(reached, dist.ReduceOp.SUM) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return low


def _counts(matrices: list[tuple[Tensor, Tensor]], keys: Tensor) -> tuple[Tensor, Tensor]:
    if not matrices:
        return keys.new_zeros(0), keys.new_zeros(0)
    thresholds = _scores_of(keys).to(matrices[0][0].device)
    greater, equal = ops.score_counts([m for m, _ in matrices], [factors for _, factors in matrices], thresholds)
    return greater.cpu(), equal.cpu()


def _scores_of(keys: Tensor) -> Tensor:
    """Scores whose bits are given; the key above infinity's is NaN."""
    return keys.int().view(torch.float32)


def _keys_of(scores: Tensor) -> Tensor:
    return (scores.view(torch.int32).long() & 0x7FFFFFFF).clamp_(max=_NAN_KEY)


def _even_shares(sizes: Sequence[int], count: int) -> list[int]:
    """``count`` divided as evenly as sizes allow."""
    shares = [0] * len(sizes)
    while (left := count - sum(shares)) > 0:
        open_ = [i for i, size in enumerate(sizes) if shares[i] < size]
        each = -(-left // len(open_))
        for i in open_:
            shares[i] += min(each, sizes[i] - shares[i], count - sum(shares))
    return shares


def _in_order(available: Sequence[int], left: int) -> list[int]:
    shares = []
    for number in available:
        shares.append(min(left, number))
        left -= shares[-1]
    return shares


def _by_rows(
    h: _Held, threshold: Tensor, numbers: list[tuple[int, int]], world: _World, ties: list[int], left: int
) -> list[int]:
    """How many of the entries equal to the threshold each process gets of a weight whose rows are cut: those of the first
    rows, and in the last of these of the first columns."""
    if left <= 0 or left >= sum(ties):
        return ties if left > 0 else [0] * len(ties)
    lengths = torch.zeros(h.layout.shape[0], dtype=torch.int64)
    at = 0
    for (matrix, factors), (above, equal) in zip(h.matrices, numbers, strict=True):
        both, greater = (
            ops.score_select(matrix, factors, threshold.to(matrix.device), number)[0].diff().long().cpu()
            for number in (above + equal, above)
        )
        lengths[at : at + len(matrix)] = both - greater
        at += len(matrix)
    of_rows = torch.stack(world.gathered(lengths))  # [world, rows]
    before = of_rows.sum(0).cumsum(0)
    row = int((before > left).nonzero()[0])  # the first that does not get all
    rest = left - (int(before[row - 1]) if row else 0)
    inside = _in_order(of_rows[:, row].tolist(), rest)
    return [int(a) + b for a, b in zip(of_rows[:, :row].sum(1), inside, strict=True)]


# ------------------------------------------------------------------------------------------------ of all processes


def _check_finite(held: list[_Held], own: dict[str, WeightSelection], factors: Mapping[str, Tensor], world: _World) -> None:
    """NaN and infinity rank first, so that any that was chosen from is among the chosen of some process."""
    largest = []
    for h in held:
        at, found, chosen = 0, [torch.zeros(())], own[h.name]
        rows, columns = chosen.rows(), chosen.columns.long()
        for matrix, of_columns in h.matrices:
            inside = slice(*chosen.row_offsets[[at, at + len(matrix)]].tolist())
            if inside.stop > inside.start:
                scores = matrix[rows[inside] - at, columns[inside]].float() * of_columns[0][columns[inside]]
                found.append(scores.abs_().amax().cpu())
            at += len(matrix)
        largest.append(torch.stack(found).amax())
    sound = torch.stack(largest).isfinite().long()
    for h, is_sound in zip(held, world.reduced(sound, dist.ReduceOp.MIN).tolist(), strict=True):
        if not is_sound:
            refuse_scores(h.name, "weight", factors[h.name])


def _whole(
    held: list[_Held], own: dict[str, WeightSelection], shards: Mapping[str, Shard], world: _World
) -> dict[str, WeightSelection]:
    """What all processes chose, put together."""
    mine: list[Tensor] = []
    for h in held:
        mine += [own[h.name].row_offsets.diff(), own[h.name].columns + h.piece.columns[0]]
    everyone = world.gathered(torch.cat([part.cpu() for part in mine]).int())
    places = [0] * world.size
    chosen = {}
    for h in held:
        lengths, columns = [], []
        for rank, read in enumerate(everyone):
            rows = shards[h.name].piece(h.layout, rank).layout.shape[0]
            lengths.append(read[places[rank] : places[rank] + rows])
            number = int(lengths[-1].sum())
            columns.append(read[places[rank] + rows : places[rank] + rows + number])
            places[rank] += rows + number
        if h.by_rows:
            chosen[h.name] = WeightSelection.trusted(h.layout, row_offsets_of(torch.cat(lengths)), torch.cat(columns))
        else:
            every = torch.arange(h.layout.shape[0])
            rows_of = [every.repeat_interleave(n.long()) for n in lengths]
            flat = torch.cat(rows_of) * h.layout.shape[1] + torch.cat(columns)
            chosen[h.name] = WeightSelection.from_flat(h.layout, flat.sort().values)
    return chosen
