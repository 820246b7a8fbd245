"""What an optimizer's step does beside its own: values that it changed go into their weights, and a lost hold is noticed.

The hooks are the process's, and stay: after a tuner was detached they refuse the steps of its optimizer, whoever made that.
As long as no compact values live they return at once.
"""

import warnings
import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fps_kernels.tuning.agreement import Agreement
from fps_kernels.tuning.compact_values import LIVING, SelectedEntries, entries_of
from fps_kernels.tuning.tuned_weight import TunedWeight

_hooked = False
_stepped: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
_NAMED = 3  # weights that a warning names


def install_hooks() -> None:
    """Once in a process: every optimizer that steps compact values writes them into their weights afterwards."""
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _hooked = True


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse a step that would reach nothing, and let weights and values agree: the step starts from what was written last.

    Raises:
        ValueError: the optimizer has weights where it should have their values, or values of a tuner that is detached, or
            the model has other parameters by now.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = set(params)
    for p in params:
        if isinstance(p, TunedWeight) and p.entries.own not in held:
            raise ValueError(
                f"the optimizer was made before attach(): it has the frozen weight {p.entries.name} and not its selected "
                "values; make it from tuner.parameters()"
            )
        entries = entries_of(p)
        if entries is not None:
            if not entries.attached:
                raise ValueError(f"the tuner of {entries.name} is detached: this optimizer's steps would reach no weight")
            if entries.tuner is None:
                entries.check_place()
    for tuner in tuners_of(optimizer):
        tuner.check_places()
    for agreement in agreements_of(optimizer):
        agreement.settle()


def agreements_of(optimizer: Optimizer) -> list[Agreement]:
    """What lets the values that an optimizer steps agree with their weights."""
    chosen, tuners = _entries_of(optimizer), tuners_of(optimizer)
    if 2 * len(chosen) < sum(tuner.weights for tuner in tuners):
        return [e.alone for e in chosen]  # one of many optimizers, as of those that step inside of the backward pass
    return [*(tuner.agreement for tuner in tuners), *(e.alone for e in chosen if e.tuner is None)]


def tuners_of(optimizer: Optimizer) -> list[Any]:
    """The tuners whose values an optimizer steps."""
    return list({id(tuner): tuner for e in _entries_of(optimizer) if (tuner := e.tuner) is not None}.values())


def _entries_of(optimizer: Optimizer) -> list[SelectedEntries]:
    return [e for group in optimizer.param_groups for p in group["params"] if (e := entries_of(p)) is not None]


def warn_of_missing(optimizer: Optimizer) -> None:
    """Once for each optimizer: name the values that got no gradient where others did, and are likely to get none ever."""
    if optimizer in _stepped:
        return
    if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        return  # a step of nothing tells nothing
    _stepped.add(optimizer)
    if silent := [e for e in _entries_of(optimizer) if e.own.grad is None]:
        warnings.warn(_missing(silent), RuntimeWarning, stacklevel=4)


def _missing(silent: list[SelectedEntries]) -> str:
    names = ", ".join(e.name for e in silent[:_NAMED])
    more = f" and {len(silent) - _NAMED} more" if len(silent) > _NAMED else ""
    return (
        f"the first backward pass gave no gradient to the selected entries of {names}{more}: they stay as they are. Either "
        "the weights took no part in it, or they were multiplied where attach() cannot see it: in an autograd.Function, a "
        "scripted function, reentrant checkpointing or as plain numbers. Exclude them from the selection, or use the "
        "model's plain layers"
    )


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if LIVING and not getattr(optimizer, "checks_attached_weights", False):
        check_optimizer(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not LIVING or getattr(optimizer, "checks_attached_weights", False):
        return
    with torch.no_grad():
        for agreement in agreements_of(optimizer):
            agreement.settle()
    warn_of_missing(optimizer)
