"""``select``: statistics, a scorer and a budget make a selection."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fps_kernels.choosing.budgets import Budget, Global, PerNeuron, ScoredWeight
from fps_kernels.choosing.calibration import ActivationStats, calibrate
from fps_kernels.choosing.feeding import Forward, check_has_values, matrix_parameters
from fps_kernels.choosing.scorers import FPS, ColumnScorer, Random, Scorer
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.weights.matrix import MatrixLayout, is_simulated, unfit
from fps_kernels.weights.offloading import brought_in, offloaded_parameters
from fps_kernels.weights.roles import Patterns, as_patterns, default_dense, matching


def select(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    scorer: Scorer | None = None,
    budget: Budget | None = None,
    stats: ActivationStats | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    dense: Patterns | None = None,
    forward: Forward | None = None,
    micro_batch: int | None = None,
    progress: bool | None = None,
) -> Selection:
    """Choose the entries worth tuning: one forward pass, no labels, no loss, no score matrix.

    Chosen from: every weight that the forward pass multiplies with, except those trained whole. Trained whole: the
    classifier head and every bias outside norm layers. Frozen: everything else.

    Args:
        model: any module whose parameters hold values, or whose weights accelerate keeps in main memory or on disk: each
            of them is brought in once more, for its choice. It is left as it was found.
        data: calibration batches, as :func:`calibrate` takes them.
        scorer: what makes an entry worth tuning; :class:`FPS` by default.
        budget: how many entries; ``PerNeuron(1)`` by default.
        stats: statistics of an earlier pass, instead of ``data``.
        include: glob patterns of weights to choose from; all by default.
        exclude: glob patterns of weights to leave frozen.
        dense: glob patterns of parameters to train whole, instead of the default ones.
        forward: ``forward(model, batch)`` runs a batch your way.
        micro_batch: split every batch into pieces of this many samples, to bound memory.
        progress: show a progress bar; ``None`` shows it on a terminal.

    Returns:
        :class:`Selection` with its indices on the devices of the weights, of offloaded ones on the CPU. ``.skipped`` says
        of every other matrix weight why it was not chosen from.

    Raises:
        ValueError: neither or both of ``data`` and ``stats``, statistics that do not fit the model or the scorer, a
            pattern that matches nothing, no weight to choose from, a weight with NaN or Inf, a budget that does not fit.
        TypeError: an ``include`` of integer or quantised weights, or patterns that are no strings.

    Example:
        >>> selection = fps.select(model, loader, scorer=fps.FPS(), budget=fps.PerNeuron(1))
        >>> print(selection)
    """
    scorer = FPS() if scorer is None else scorer
    budget = PerNeuron(1) if budget is None else budget
    if not isinstance(scorer, ColumnScorer | Random):
        raise TypeError(f"scorer must be a scorer such as fps.FPS(), got {scorer!r}")
    check_budget(budget)
    if stats is not None and not isinstance(stats, ActivationStats):
        raise TypeError(f"stats must be ActivationStats, as from fps.calibrate(), got {type(stats).__name__}")
    if (data is None) == (stats is None):
        raise ValueError("give either data or stats" + (", not both" if data is not None else ""))
    check_has_values(model)
    # Patterns are checked before the pass, which may take long.
    eligible, dense_names, skipped = eligible_weights(model, include, exclude, dense)
    if stats is None:
        assert data is not None
        stats = calibrate(
            model,
            data,
            ord=1 if scorer.ord is None else scorer.ord,
            forward=forward,
            micro_batch=micro_batch,
            max_batches=1 if scorer.ord is None else None,  # only to see which weights are used
            progress=progress,
        )
    elif scorer.ord is not None and stats.ord != scorer.ord:
        raise ValueError(f"stats has ord={stats.ord}, but {scorer!r} needs ord={scorer.ord}")
    layouts = usable_layouts(eligible, stats, skipped)
    for name, layout in layouts.items():
        budget.check(name, layout)
    offloaded = offloaded_parameters(model)
    if isinstance(scorer, Random):
        chosen = budget.draw(layouts, torch.Generator().manual_seed(scorer.seed))
        chosen = {name: w if name in offloaded else w.to(eligible[name].device) for name, w in chosen.items()}
    elif away := offloaded.keys() & layouts.keys():
        if isinstance(budget, Global):
            raise ValueError(
                f"a Global budget compares all weights, and {min(away)} is offloaded: use PerTensor, LikeLoRA or PerNeuron"
            )
        chosen = {
            name: _choose_one(name, eligible[name], offloaded.get(name), layouts[name], budget, scorer, stats)
            for name in layouts
        }
    else:
        factors = {name: scorer.factors(stats, name).to(eligible[name].device, torch.float32) for name in layouts}
        chosen = choose(eligible, layouts, budget, factors)
    description = {"scorer": repr(scorer), "budget": repr(budget)}
    return Selection(chosen, dense_names, skipped, dict(stats.tied), description)


def _choose_one(
    name: str,
    parameter: nn.Parameter,
    owner: tuple[nn.Module, str] | None,
    layout: MatrixLayout,
    budget: Budget,
    scorer: ColumnScorer,
    stats: ActivationStats,
) -> WeightSelection:
    """The choice from one weight, which is brought in for it if it is offloaded; indices of those are on the CPU."""
    with nullcontext(parameter.detach()) if owner is None else brought_in(*owner) as values:
        factors = scorer.factors(stats, name).to(values.device, torch.float32)
        chosen = best_entries([ScoredWeight(name, layout, values, factors)], budget)[name]
        return chosen if owner is None else chosen.to("cpu")


def check_budget(budget: Any) -> None:
    """Refuse what is no budget."""
    if not isinstance(budget, Budget):
        raise TypeError(f"budget must be PerNeuron, PerTensor, LikeLoRA or Global, got {budget!r}")


def eligible_weights(
    model: nn.Module, include: Patterns | None, exclude: Patterns | None, dense: Patterns | None
) -> tuple[dict[str, nn.Parameter], tuple[str, ...], dict[str, str]]:
    """Split a model's parameters: weights to choose from, names to train whole, and reasons for the rest.

    Raises:
        ValueError: a pattern that matches nothing.
        TypeError: an ``include`` of weights that are not floating-point.
    """
    every = dict(model.named_parameters())
    matrices = matrix_parameters(model)
    wanted = as_patterns(include, "include")
    included = set(matching(wanted, matrices, "include", "matrix weights")) if include is not None else set(matrices)
    excluded = set(matching(as_patterns(exclude, "exclude"), every, "exclude", "parameters"))
    if dense is None:
        # A weight that include names in full is chosen from, even if the protocol would train it whole.
        whole = tuple(n for n in default_dense(model) if n not in excluded and n not in wanted)
    else:
        whole = tuple(matching(as_patterns(dense, "dense"), every, "dense", "parameters"))
        if clash := [n for n in whole if n in excluded]:
            raise ValueError(f"{clash[0]} matches both dense and exclude")
    for name in whole:
        if reason := unfit(every[name]):
            raise TypeError(f"{name} cannot be trained whole: {reason}")
    eligible, skipped = {}, {}
    for name, p in matrices.items():
        if name in whole:
            skipped[name] = "trained whole"
        elif name in excluded:
            skipped[name] = "excluded"
        elif name not in included:
            skipped[name] = "not included"
        elif reason := unfit(p):
            if include is not None:
                raise TypeError(f"{name} cannot be tuned: {reason}")
            skipped[name] = reason
        elif p.numel() == 0:
            skipped[name] = "it has no entries"
        else:
            eligible[name] = p
    return eligible, whole, skipped


def usable_layouts(
    eligible: dict[str, nn.Parameter], stats: ActivationStats, skipped: dict[str, str]
) -> dict[str, MatrixLayout]:
    """Layouts of the eligible weights that have statistics; reasons for the others go to ``skipped``.

    Raises:
        ValueError: statistics of another model, or no weight left.
    """
    layouts = {}
    for name, p in eligible.items():
        if name in stats:
            layout = stats[name].layout
            if layout.parameter_shape != tuple(p.shape):
                raise ValueError(
                    f"stats are of another model: {name} has shape {list(p.shape)} here, "
                    f"{list(layout.parameter_shape)} in the statistics"
                )
            layouts[name] = layout
        elif name in stats.unused:
            skipped[name] = stats.unused[name]
        else:
            raise ValueError(f"stats are of another model: they do not mention {name}")
    if not layouts:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"no weight is left to choose from ({reasons or 'the model has no matrix weights'})")
    return layouts


def choose(
    parameters: dict[str, nn.Parameter], layouts: dict[str, MatrixLayout], budget: Budget, factors: dict[str, Tensor]
) -> dict[str, WeightSelection]:
    """The best entries within the budget, by ``|w_ij| * c_j``; ``factors`` are float32 ``[G, C]`` on the weights' devices.

    Raises:
        ValueError: a score that is NaN or infinite, with the name of its weight.
    """
    scored = [ScoredWeight(name, layout, parameters[name].detach(), factors[name]) for name, layout in layouts.items()]
    return best_entries(scored, budget)


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
