"""The best entries within a budget, and what makes a score worthless."""

import torch
from torch import Tensor

from fps_kernels.choosing.budgets import Budget, Global, ScoredWeight
from fps_kernels.selection import WeightSelection
from fps_kernels.weights.matrix import is_simulated


def best_entries(scored: list[ScoredWeight], budget: Budget, what: str = "weight") -> dict[str, WeightSelection]:
    """The best entries within the budget, by ``|matrix| * factors``; ``what`` names the matrix in errors.

    Raises:
        ValueError: a score that is NaN or infinite, with the name of its weight.
    """
    chosen: dict[str, WeightSelection] = {}
    largest: dict[str, Tensor] = {}
    # Weights that do not compete go one by one, so that each is still in the cache when its choice is looked at.
    for group in [scored] if isinstance(budget, Global) else [[w] for w in scored]:
        chosen |= budget.choose(group)
        for w in group:
            if chosen[w.name].nnz and not is_simulated(w.values):
                largest[w.name] = _largest_score(w, chosen[w.name])
    # NaN and infinity rank first, so that any in a weight that was chosen from is among the chosen.
    if largest and not all(torch.stack([score.cpu() for score in largest.values()]).isfinite().tolist()):
        bad = next(w for w in scored if w.name in largest and not largest[w.name].isfinite())
        culprit = f"the {what}, or an overflow of |{what}| * factor" if bad.factors.isfinite().all() else "its factors"
        raise ValueError(f"the scores of {bad.name} contain NaN or Inf: check {culprit}")
    return chosen


def _largest_score(w: ScoredWeight, entries: WeightSelection) -> Tensor:
    rows, columns = entries.rows(), entries.columns.long()
    groups = w.factors.shape[0]
    factors = w.factors[0, columns] if groups == 1 else w.factors[rows // (w.layout.shape[0] // groups), columns]
    return (w.matrix[rows, columns].float() * factors).abs_().amax()
