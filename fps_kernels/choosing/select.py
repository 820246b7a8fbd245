"""``select``: statistics, a scorer and a budget make a selection."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from os import PathLike
from typing import Any

import torch
from torch import nn

from fps_kernels.choosing.best_entries import best_entries
from fps_kernels.choosing.budgets import Budget, PerNeuron, ScoredWeight, check_budget
from fps_kernels.choosing.calibration import merged_statistics, unchecked_statistics
from fps_kernels.choosing.candidates import eligible_weights, usable_layouts
from fps_kernels.choosing.feeding import AT_ONCE, Forward, ordinary_tensors
from fps_kernels.choosing.finite_checks import FiniteCheck, check_finite
from fps_kernels.choosing.on_the_way import OnTheWay
from fps_kernels.choosing.scorers import FPS, ColumnScorer, Random, Scorer
from fps_kernels.choosing.sharded import sharded_entries
from fps_kernels.choosing.statistics import ActivationStats
from fps_kernels.ops.transfers import sent
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.weights.matrix import MatrixLayout
from fps_kernels.weights.offloading import brought_in
from fps_kernels.weights.roles import Patterns
from fps_kernels.weights.sharding import check_sharding
from fps_kernels.weights.streaming import streamed
from fps_kernels.weights.survey import Survey


def select(
    model: nn.Module | Survey,
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
    process_group: Any = None,
    checkpoint: str | PathLike[str] | None = None,
    batches_at_once: int = AT_ONCE,
    progress: bool | None = None,
) -> Selection:
    """Choose the entries worth tuning: one forward pass, no labels, no loss, no score matrix.

    Under ``torch.inference_mode`` as well: what it gives can be attached outside of it.

    Chosen from: every weight that the forward pass multiplies with, except those trained whole. Trained whole: the
    classifier head and every bias outside norm layers. Frozen: everything else.

    Args:
        model: any module whose parameters hold values, or whose weights accelerate keeps in main memory or on disk: each
            of them is brought in once for ``batches_at_once`` batches, and chosen from in the last one. It is left as it
            was found. What was found by looking at it before will do.
        data: calibration batches, as :func:`calibrate` takes them.
        scorer: what makes an entry worth tuning; :class:`FPS` by default.
        budget: how many entries; ``PerNeuron(1)`` by default.
        stats: statistics of an earlier pass, instead of ``data``.
        include: glob patterns of weights to choose from; all by default.
        exclude: glob patterns of weights to leave frozen.
        dense: glob patterns of parameters to train whole, instead of the default ones.
        forward: ``forward(model, batch)`` runs a batch your way.
        micro_batch: split every batch into pieces of this many samples, to bound memory.
        process_group: of ``torch.distributed``: each of its processes calls this with a part of the data, and all make the
            same choice, from all of it. By default the default group, where there is one of several processes; ``False``
            for a choice of this process alone.
        checkpoint: of a model that was built without memory (``accelerate.init_empty_weights()``): a safetensors file, an
            index of several, or a folder with either. Weights stay there, and are read when their module runs (needs
            accelerate).
        batches_at_once: of a model whose weights are kept elsewhere: how many batches, or pieces of ``micro_batch``, go
            through it together, block by block, so that a block is brought in once for all of them. Meanwhile each holds
            its input and what it has computed between two blocks; 1 is one after the other.
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
    where: Any = nullcontext() if checkpoint is None else _streamed(model, checkpoint)
    survey = Survey.of(model)  # before weights are streamed: accelerate takes those that are shared for several
    with ordinary_tensors(), where:
        return _select(
            survey,
            data,
            scorer,
            budget,
            stats,
            include,
            exclude,
            dense,
            forward,
            micro_batch,
            _several(process_group),
            batches_at_once,
            progress,
        )


def _streamed(model: nn.Module | Survey, checkpoint: str | PathLike[str]) -> Any:
    if isinstance(model, Survey):
        raise TypeError("checkpoint needs the model itself, not what was found by looking at it")
    return streamed(model, checkpoint)


def _several(group: Any) -> Any:
    """A group of several processes to choose with; ``False`` if there is none."""
    if group is False:
        return False
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        if group is not None:
            raise ValueError(
                "process_group was given, but torch.distributed is not initialised: call init_process_group first"
            )
        return False
    return group if torch.distributed.get_world_size(group) > 1 else False


def _select(
    survey: Survey,
    data: Iterable[Any] | None,
    scorer: Scorer,
    budget: Budget,
    stats: ActivationStats | None,
    include: Patterns | None,
    exclude: Patterns | None,
    dense: Patterns | None,
    forward: Forward | None,
    micro_batch: int | None,
    group: Any,
    at_once: int,
    progress: bool | None,
) -> Selection:
    check_sharding(survey)
    survey.check_has_values()
    if survey.sharded and group is False and torch.distributed.get_world_size() > 1:
        raise ValueError("process_group=False, but the model is sharded: all of its processes choose together")
    # Patterns are checked before the pass, which may take long.
    eligible, dense_names, skipped = eligible_weights(survey, include, exclude, dense)
    checks: list[FiniteCheck] = []
    on_the_way = None
    if stats is None:
        assert data is not None
        ord = 1.0 if scorer.ord is None else scorer.ord
        most = 1 if scorer.ord is None else None  # only to see which weights are used
        if isinstance(scorer, ColumnScorer) and survey.offloaded and not budget.competes and group is False:
            owners = {name: owner for name, owner in survey.offloaded.items() if name in eligible}
            on_the_way = OnTheWay(owners, scorer, budget, ord)
        on_complete = None if on_the_way is None else on_the_way.choose
        stats, checks = unchecked_statistics(survey, data, ord, forward, micro_batch, most, progress, on_complete, at_once)
        if group is not False:
            checks = merged_statistics(stats, group)
    elif scorer.ord is not None and stats.ord != scorer.ord:
        raise ValueError(f"stats has ord={stats.ord}, but {scorer!r} needs ord={scorer.ord}")
    _say_unseen(stats)
    stats = stats.filled()
    layouts, unusable = usable_layouts(eligible, stats)
    skipped |= unusable
    if not layouts:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"no weight is left to choose from ({reasons or 'the model has no matrix weights'})")
    for name, layout in layouts.items():
        budget.check(name, layout)
    if remark := budget.remark(layouts):
        warnings.warn(remark, stacklevel=4)
    if isinstance(scorer, Random):
        generator = torch.Generator().manual_seed(scorer.seed)
        chosen: dict[str, WeightSelection] = {}
        for names in budget.groups(layouts):
            chosen |= budget.draw({name: layouts[name] for name in names}, generator)
        check_finite(checks)
    elif survey.sharded:
        check_finite(checks)
        factors = {name: scorer.factors(stats, name) for name in layouts}
        chosen = sharded_entries(layouts, survey.sharded, factors, budget)
    else:
        early: dict[str, WeightSelection] = {}
        if on_the_way is not None:
            check_finite(checks)  # before what those activations made of scores
            checks, early = [], on_the_way.chosen({name: stats[name] for name in layouts})
        left = {name: layout for name, layout in layouts.items() if name not in early}
        later = best_entries(_scored(survey, left, budget, scorer, stats), budget, checks=checks)
        chosen = {name: early[name] if name in early else later[name] for name in layouts}
    chosen |= Selection({name: chosen[name] for name in chosen if name in survey.offloaded}).to("cpu").weights
    chosen = {name: w if name in survey.offloaded else w.to(eligible[name].device) for name, w in chosen.items()}
    description = {"scorer": repr(scorer), "budget": repr(budget)}
    return Selection(chosen, dense_names, skipped, dict(stats.tied), description)


def _say_unseen(stats: ActivationStats) -> None:
    unseen = {name: s.unseen for name, s in stats.weights.items() if s.unseen}
    if unseen:
        name = next(iter(unseen))
        more = f", and more in {len(unseen) - 1} other weights" if len(unseen) > 1 else ""
        warnings.warn(
            f"no token was sent to {unseen[name]} of the {len(stats[name].rows)} experts in {name}{more}: they are "
            "scored as if they had seen what the others saw on average. More calibration data may reach them",
            stacklevel=5,
        )


def _scored(
    survey: Survey, layouts: dict[str, MatrixLayout], budget: Budget, scorer: ColumnScorer, stats: ActivationStats
) -> Iterator[list[ScoredWeight]]:
    """Weights with their factors, by groups that compete; offloaded ones are brought in while their group is chosen from."""
    if budget.competes and (away := survey.offloaded.keys() & layouts.keys()):
        raise ValueError(
            f"a {type(budget).__name__} budget compares all weights, and {min(away)} is offloaded: use PerTensor, LikeLoRA "
            "or PerNeuron"
        )
    for names in budget.groups(layouts):
        with ExitStack() as present:
            group = []
            for name in names:
                owner = survey.offloaded.get(name)
                parameter = survey.parameters[name].detach()
                values = parameter if owner is None else present.enter_context(brought_in(*owner))
                factors = sent(scorer.factors(stats, name), values.device, torch.float32)
                group.append(ScoredWeight(name, layouts[name], values, factors, stays=owner is None))
            yield group
