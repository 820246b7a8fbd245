"""The best entries within a budget, and what makes a score worthless."""

from collections.abc import Iterable, Sequence
from functools import partial

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

    The host waits for a GPU once, when all is chosen, and once before that where a budget has to know how many entries a
    weight gets or how many equal scores it takes.

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

    def finish(group: list[ScoredWeight], begun: Begun, read: list[Tensor]) -> None:
        found.update(begun.finish(read))
        for w in group:
            if found[w.name].nnz and not is_simulated(w.values):
                scores.append(FiniteCheck(_largest_score(w, found[w.name]), partial(_refuse, w.name, what, w.factors)))

    for group in groups:
        begun = budget.begin(group)
        order += [w.name for w in group]
        if all(w.stays for w in group) and any(t.device.type != "cpu" for t in begun.unread):
            under_way.append((group, begun))
        else:  # while they are still in the cache
            finish(group, begun, fetched(begun.unread))
    read = iter(fetched([t for _, begun in under_way for t in begun.unread]))
    for group, begun in under_way:
        finish(group, begun, [next(read) for _ in begun.unread])
    # NaN and infinity rank first, so that any in a weight that was chosen from is among the chosen.
    check_finite([*checks, *scores])
    return {name: found[name] for name in order}


def _refuse(name: str, what: str, factors: Tensor) -> None:
    culprit = f"the {what}, or an overflow of |{what}| * factor" if factors.isfinite().all() else "its factors"
    raise ValueError(f"the scores of {name} contain NaN or Inf: check {culprit}")


def _largest_score(w: ScoredWeight, entries: WeightSelection) -> Tensor:
    rows, columns = entries.rows(), entries.columns.long()
    groups = w.factors.shape[0]
    factors = w.factors[0, columns] if groups == 1 else w.factors[rows // (w.layout.shape[0] // groups), columns]
    return (w.matrix[rows, columns].float() * factors).abs_().amax()
