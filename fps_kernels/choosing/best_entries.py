"""The best entries within a budget, and what makes a score worthless."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from fps_kernels.choosing.budgets import Begun, Budget, ScoredWeight
from fps_kernels.choosing.finite_checks import FiniteCheck, check_finite
from fps_kernels.ops.transfers import fetched
from fps_kernels.selection import WeightSelection
from fps_kernels.weights.matrix import is_simulated


def best_entries(
    groups: Iterable[list[ScoredWeight]], budget: Budget, what: str = "weight", checks: Sequence[FiniteCheck] = ()
) -> dict[str, WeightSelection]:
    """The best entries within the budget, by ``|matrix| * factors``.

    The host waits for a GPU once: when all is chosen, or, where weights compete, for how many entries each of them gets.

    Args:
        groups: weights that compete, as :meth:`Budget.groups` puts them together. A group is asked for when the choice from
            the one before is made or, of weights that stay, under way, so that weights may be brought in for it.
        budget: how many entries.
        what: names the matrix in errors.
        checks: of what came before, made first of all at the end.

    Raises:
        ValueError: a score that is NaN or infinite, with the name of its weight; or as one of the checks.
    """
    found: dict[str, WeightSelection] = {}
    scores: list[FiniteCheck] = []
    under_way: list[tuple[list[ScoredWeight], Begun]] = []
    order: list[str] = []

    def finish(group: list[ScoredWeight], begun: Begun, read: Sequence[Tensor], sound: Sequence[bool]) -> None:
        found.update(begun.finish(read))
        for w, is_sound in zip(group, sound, strict=True):
            if found[w.name].nnz and not is_sound and not is_simulated(w.values):
                scores.append(FiniteCheck(_largest_score(w, found[w.name]), partial(refuse_scores, w.name, what, w.factors)))

    for group in groups:
        begun = budget.begin(group)
        order += [w.name for w in group]
        if all(w.stays for w in group) and any(map(_would_wait, begun.unread)):
            under_way.append((group, begun))
        else:  # while they are still in the cache
            finish(group, begun, fetched(begun.unread), [False] * len(group))
    # What would be waited for at the end comes along; an exact look at scores follows only where a bound is not finite.
    waited_for = [[*begun.unread, *map(_score_bound, group)] for group, begun in under_way]
    numbers = iter(fetched([*chain.from_iterable(waited_for), *(check.number for check in checks)] if under_way else ()))
    for group, begun in under_way:
        read = [next(numbers) for _ in begun.unread]
        finish(group, begun, read, [math.isfinite(next(numbers).item()) for _ in group])
    checks = [check._replace(number=number) for check, number in zip(checks, numbers, strict=True)] if under_way else checks
    # NaN and infinity rank first, so that any in a weight that was chosen from is among the chosen.
    check_finite([*checks, *scores])
    return {name: found[name] for name in order}


def _would_wait(tensor: Tensor) -> bool:
    """Whether the host waits for a device to read it."""
    return tensor.device.type != "cpu"


def refuse_scores(name: str, what: str, factors: Tensor) -> None:
    """Refuse a weight.

    Raises:
        ValueError: always; it says whether its factors are to blame.
    """
    culprit = f"the {what}, or an overflow of |{what}| * factor" if factors.isfinite().all() else "its factors"
    raise ValueError(f"the scores of {name} contain NaN or Inf: check {culprit}")


def _largest_score(w: ScoredWeight, entries: WeightSelection) -> Tensor:
    rows, columns = entries.rows(), entries.columns.long()
    groups = w.factors.shape[0]
    factors = w.factors[0, columns] if groups == 1 else w.factors[rows // (w.layout.shape[0] // groups), columns]
    return (entries.of(w.values).float() * factors).abs_().amax()


def _score_bound(w: ScoredWeight) -> Tensor:
    """At least the largest score, and not finite where any score is not."""
    if not w.values.numel():
        return w.factors.new_zeros(())
    largest: Tensor = torch.linalg.vector_norm(w.values, math.inf)
    return largest.float() * w.factors.amax()
