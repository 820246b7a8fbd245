"""The best entries within a budget, and what makes a score worthless."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fps_kernels.choosing.budgets import Budget, ScoredWeight
from fps_kernels.selection import WeightSelection
from fps_kernels.weights.matrix import is_simulated


def best_entries(groups: Iterable[list[ScoredWeight]], budget: Budget, what: str = "weight") -> dict[str, WeightSelection]:
    """The best entries within the budget, by ``|matrix| * factors``.

    Args:
        groups: weights that compete, as :meth:`Budget.groups` puts them together. A group is asked for when the choice from
            the one before is made, so that weights may be brought in for it.
        budget: how many entries.
        what: names the matrix in errors.

    Raises:
        ValueError: a score that is NaN or infinite, with the name of its weight.
    """
    chosen: dict[str, WeightSelection] = {}
    largest: dict[str, tuple[Tensor, Tensor]] = {}
    for group in groups:
        chosen |= budget.choose(group)
        for w in group:  # while they are still in the cache
            if chosen[w.name].nnz and not is_simulated(w.values):
                largest[w.name] = _largest_score(w, chosen[w.name]), w.factors
    # NaN and infinity rank first, so that any in a weight that was chosen from is among the chosen. One wait for the device.
    if largest and not all(torch.stack([score.cpu() for score, _ in largest.values()]).isfinite().tolist()):
        name, factors = next((name, factors) for name, (score, factors) in largest.items() if not score.isfinite())
        culprit = f"the {what}, or an overflow of |{what}| * factor" if factors.isfinite().all() else "its factors"
        raise ValueError(f"the scores of {name} contain NaN or Inf: check {culprit}")
    return chosen


def _largest_score(w: ScoredWeight, entries: WeightSelection) -> Tensor:
    rows, columns = entries.rows(), entries.columns.long()
    groups = w.factors.shape[0]
    factors = w.factors[0, columns] if groups == 1 else w.factors[rows // (w.layout.shape[0] // groups), columns]
    return (w.matrix[rows, columns].float() * factors).abs_().amax()
