"""What makes an entry of a weight worth tuning.

A column scorer gives every entry the score ``s_ij = |w_ij| * c_j`` with one factor per column, so that the fused kernels
can choose without a score matrix. :class:`Random` draws its entries instead and exists for comparison.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fps_kernels.choosing.statistics import ActivationStats
from fps_kernels.ops.transfers import sent


class ColumnScorer(ABC):
    """Scores entries by ``|w_ij| * c_j``.

    Attributes:
        ord: which column norms :meth:`factors` needs: 1, 2, ``inf``, or ``None`` if it needs none.
    """

    ord: float | None

    @abstractmethod
    def factors(self, stats: ActivationStats, name: str) -> Tensor:
        """The factors ``c`` of one weight.

        Args:
            stats: statistics with this scorer's ``ord``.
            name: the weight's parameter name.

        Returns:
            ``[G, C]``: one factor per column, for each of ``G`` equal blocks of output rows.
        """


@dataclass(frozen=True)
class FPS(ColumnScorer):
    """``|w_ij| * mean |a_j|``: weight magnitude times the mean magnitude of the input it multiplies.

    Source: "Feedforward-based Parameter Selection for Efficient Fine-Tuning", arXiv 2510.27359 v1.

    Example:
        >>> selection = fps.select(model, loader, scorer=fps.FPS(), budget=fps.PerNeuron(1))
    """

    ord = 1

    def factors(self, stats: ActivationStats, name: str) -> Tensor:
        return stats[name].mean()


@dataclass(frozen=True)
class Wanda(ColumnScorer):
    """``|w_ij| * ||a_j||_2``.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1
    (there the lowest scores are pruned; here the highest are tuned).

    Example:
        >>> selection = fps.select(model, loader, scorer=fps.Wanda())
    """

    ord = 2

    def factors(self, stats: ActivationStats, name: str) -> Tensor:
        return stats[name].norm.sqrt()


@dataclass(frozen=True)
class Magnitude(ColumnScorer):
    """``|w_ij|``: the largest weights. Its data only shows which weights the model multiplies with.

    Example:
        >>> selection = fps.select(model, loader, scorer=fps.Magnitude())
    """

    ord = None

    def factors(self, stats: ActivationStats, name: str) -> Tensor:
        return torch.ones_like(stats[name].norm)


@dataclass(frozen=True)
class GrowthDriven(ColumnScorer):
    """``|w_ij| * mean|a_j| / (mean|a_j| of the anchor + eps)``: how much a column grew since pre-training.

    Our reading of GD-FPS (arXiv 2510.27359 v2), whose published abstract gives no formula.

    Attributes:
        anchor: statistics (``ord=1``) of the same model on data like that of its pre-training.
        eps: added to the anchor, relative to the mean over the columns of a weight (the larger of anchor's and now), so
            that a column that was silent in pre-training has a large but finite factor.

    Example:
        >>> anchor = fps.calibrate(model, pretraining_sample)
        >>> selection = fps.select(model, loader, scorer=fps.GrowthDriven(anchor))
    """

    anchor: ActivationStats
    eps: float = 1e-6
    ord = 1

    def __post_init__(self) -> None:
        if not isinstance(self.anchor, ActivationStats):
            raise TypeError(f"anchor must be ActivationStats, as from fps.calibrate(), got {type(self.anchor).__name__}")
        if self.anchor.ord != 1:
            raise ValueError(f"anchor must have ord=1, got ord={self.anchor.ord}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")

    def __repr__(self) -> str:
        return f"GrowthDriven(anchor={len(self.anchor)} weights, eps={self.eps})"

    def factors(self, stats: ActivationStats, name: str) -> Tensor:
        if name not in self.anchor:
            raise ValueError(f"anchor has no statistics of {name}: is it of the same model?")
        if self.anchor[name].layout != stats[name].layout:
            raise ValueError(f"anchor has {self.anchor[name].layout} for {name}, expected {stats[name].layout}")
        now, before = stats[name].mean(), self.anchor[name].filled(1).mean()
        blocks = math.lcm(len(now), len(before))  # an attention may have had one input then, and three now
        now = now.repeat_interleave(blocks // len(now), 0)
        before = sent(before.repeat_interleave(blocks // len(before), 0), now.device)
        scale = torch.maximum(before.mean(), now.mean()).clamp(min=torch.finfo(torch.float32).tiny)
        return now / (before + self.eps * scale)


@dataclass(frozen=True)
class Random:
    """Entries drawn uniformly without replacement: the baseline every choice has to beat.

    Attributes:
        seed: the same seed draws the same entries of the same model.

    Example:
        >>> selection = fps.select(model, loader, scorer=fps.Random(seed=0), budget=fps.Global(0.01))
    """

    seed: int = 0
    ord = None


Scorer = ColumnScorer | Random
