"""Choosing from weights that are brought in from elsewhere while they are there for the last batch.

A weight that has to be read from a disk is read once for the batches that go together, and not once more for its choice.
"""

from collections.abc import Mapping

import torch
from torch import nn

from fps_kernels.choosing.best_entries import best_entries
from fps_kernels.choosing.budgets import Budget, ScoredWeight
from fps_kernels.choosing.scorers import ColumnScorer
from fps_kernels.choosing.statistics import ActivationStats, WeightStats
from fps_kernels.ops.transfers import sent
from fps_kernels.selection import WeightSelection


class OnTheWay:
    """Chooses from each weight in the forward pass of the last batch, as soon as its statistics are whole.

    Args:
        owners: of the weights that may be chosen from: the modules that have them while they run, and the names there.
        scorer: what makes an entry worth tuning.
        budget: how many entries of each weight.
        ord: of the statistics.
    """

    def __init__(
        self, owners: Mapping[str, tuple[nn.Module, str]], scorer: ColumnScorer, budget: Budget, ord: float
    ) -> None:
        self._owners, self._scorer, self._budget, self._ord = owners, scorer, budget, ord
        self._found: dict[str, tuple[int, WeightSelection]] = {}
        self._errors: dict[str, ValueError] = {}

    def choose(self, name: str, stats: WeightStats) -> None:
        """Called by calibration, while the weight's module runs."""
        module, leaf = self._owners.get(name, (None, ""))
        weight = None if module is None else module._parameters.get(leaf)
        if weight is None or weight.is_meta or stats.unseen:
            return
        factors = self._scorer.factors(ActivationStats(self._ord, {name: stats}), name)
        values = weight.detach()
        scored = ScoredWeight(name, stats.layout, values, sent(factors, values.device, torch.float32), stays=False)
        self._errors.pop(name, None)
        try:
            self._found[name] = stats.calls, best_entries([[scored]], self._budget)[name].to("cpu")
        except ValueError as error:  # said when the pass is over, and not as an error of the model
            self._errors[name] = error

    def chosen(self, stats: Mapping[str, WeightStats]) -> dict[str, WeightSelection]:
        """The choices that still hold, of weights that were not used once more.

        Raises:
            ValueError: a score that is NaN or infinite, with the name of its weight.
        """
        for name, error in self._errors.items():
            if name in stats:
                raise error
        return {name: w for name, (calls, w) in self._found.items() if name in stats and stats[name].calls == calls}
