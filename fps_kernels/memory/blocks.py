"""Equal blocks of a model: a model with a few of them tells what one with all of them would need."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

FEW = 2
"""Periods of each run that are left in the smallest model."""
_WORTHWHILE = 4  # periods from which on a run is shortened


@dataclass(frozen=True)
class Run:
    """Blocks of the same parameters and buffers, one after the other.

    Attributes:
        container: path of the ``Sequential`` or ``ModuleList`` that holds them.
        start: index of the first one.
        period: blocks after which they repeat: 2 where two kinds take turns.
        count: periods.
    """

    container: str
    start: int
    period: int
    count: int


def runs_of(model: nn.Module) -> list[Run]:
    """The runs that are long enough to be shortened, outermost ones only."""
    found: list[Run] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList) or any(
            path.startswith(f"{run.container}.") for run in found
        ):
            continue
        if path:  # a model that is a Sequential itself cannot be told from one that is called by index
            found += _runs(path, [_signature(block) for block in module])
    return found


def _runs(path: str, signatures: Sequence[object]) -> list[Run]:
    found = []
    at = 0
    while at < len(signatures):
        best = max(
            (Run(path, at, period, _periods(signatures, at, period)) for period in (1, 2)), key=lambda r: r.count * r.period
        )
        if best.count >= _WORTHWHILE and signatures[at]:
            found.append(best)
            at += best.count * best.period
        else:
            at += 1
    return found


def _periods(signatures: Sequence[object], at: int, period: int) -> int:
    first, count = signatures[at : at + period], 0
    while len(first) == period and signatures[at + count * period : at + (count + 1) * period] == first:
        count += 1
    return count


def _signature(block: nn.Module) -> tuple[object, ...]:
    """What makes two blocks cost the same; empty for blocks without parameters, which are not worth it."""
    parameters = [(name, tuple(p.shape)) for name, p in block.named_parameters()]
    if not parameters:
        return ()
    kinds = [(name, type(m)) for name, m in block.named_modules() if m._parameters]
    return (type(block), *parameters, *((name, tuple(b.shape)) for name, b in block.named_buffers()), *kinds)


def shortened(model: nn.Module, runs: Sequence[Run], periods: Sequence[int]) -> nn.Module:
    """A copy of a model without memory, with so many periods of each run."""
    whole = {}
    for path in dict.fromkeys(run.container for run in runs):
        container = model.get_submodule(path)
        assert isinstance(container, nn.Sequential | nn.ModuleList)
        kept = list(range(len(container)))
        for run, count in zip(runs, periods, strict=True):
            if run.container == path:
                left_out = range(run.start + count * run.period, run.start + run.count * run.period)
                kept = [i for i in kept if i not in left_out]
        children = list(container)
        few = [children[i] for i in kept]
        whole[path] = container
        model.set_submodule(path, nn.Sequential(*few) if isinstance(container, nn.Sequential) else nn.ModuleList(few))
    try:
        with unset_fake_temporarily():
            return copy.deepcopy(model)
    finally:
        for path, container in whole.items():
            model.set_submodule(path, container)
