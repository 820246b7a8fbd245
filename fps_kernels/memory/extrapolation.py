"""From steps of models with a few blocks to those of the whole model, and to the largest batch that fits."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fps_kernels.memory.blocks import FEW, runs_of, shortened
from fps_kernels.memory.measuring import placed
from fps_kernels.memory.rehearsal import Occasion, Parts, Rehearsal, chosen, rehearsal, with_lora
from fps_kernels.selection import Selection


class Theatre:
    """Where steps are rehearsed, inside of :func:`~fps_kernels.memory.simulated`: the model is built once, without memory.

    Args:
        create: makes the model.
        occasion: what all methods have in common.
    """

    def __init__(self, create: Callable[[], nn.Module], occasion: Occasion) -> None:
        self.occasion = occasion
        # Constructors compute with real numbers (drop-path rates, ...), so that only parameters are left out at first.
        with unset_fake_temporarily(), torch.device("meta"):
            self.whole = create().to(occasion.dtype)
        self._selections: dict[tuple[int, ...], Selection] = {}  # by the periods of the model that they are of
        self.runs = runs_of(self.whole)
        if self.runs and not self._runs_with_few():
            self.runs = []

    def _runs_with_few(self) -> bool:
        """Whether the model takes a sample with few of its blocks; one that asks for a block by its number does not."""
        try:
            self._rehearsal("forward", [FEW] * len(self.runs))(1)
        except (IndexError, KeyError, AttributeError, RuntimeError, ValueError, TypeError, AssertionError):
            return False
        return True

    def _rehearsal(self, method: str, periods: list[int]) -> Rehearsal:
        model = shortened(self.whole, self.runs, periods)
        if method.startswith("LoRA"):
            with unset_fake_temporarily(), torch.device("meta"):
                model = with_lora(model)
        model = placed(model)
        selection = None
        if method.startswith("attach"):
            key = tuple(periods)
            selection = self._selections[key] = self._selections.get(key) or chosen(model, self.occasion)
        return rehearsal(method, model, self.occasion, selection)

    def of(self, method: str) -> "Steps":
        """Steps of a method with the whole model."""
        if not self.runs:
            return Steps(_remembered(self._rehearsal(method, [])), [], [])
        few = [FEW] * len(self.runs)
        base = _remembered(self._rehearsal(method, few))
        more = [self._rehearsal(method, [n + (i == j) for j, n in enumerate(few)]) for i in range(len(self.runs))]
        return Steps(base, [run.count - FEW for run in self.runs], [_remembered(m) for m in more])


@dataclass(frozen=True)
class Steps:
    """Steps of a method with the whole model.

    Attributes:
        small: those of the model with few of its blocks, which grow with the batch as those of the whole one do.
        left_out: periods of each run that it lacks.
        more: steps of the models with one more period of each run.
    """

    small: Rehearsal
    left_out: list[int]
    more: list[Rehearsal]

    def __call__(self, count: int) -> Parts:
        """What a step of a batch takes."""
        start = self.small(count).numbers()
        total = list(start)
        for lacking, one_more in zip(self.left_out, self.more, strict=True):
            total = [t + lacking * (b - a) for t, a, b in zip(total, start, one_more(count).numbers(), strict=True)]
        return Parts.of(total)


def _remembered(step: Rehearsal) -> Rehearsal:
    known: dict[int, Parts] = {}

    def remembered(count: int) -> Parts:
        if count not in known:
            known[count] = step(count)
        return known[count]

    return remembered


def largest_batch(step: Steps, batch: int, memory: int) -> int:
    """The largest batch whose peak fits, 0 if none does.

    Every phase of a step grows by the same amount with each sample, so that two batches tell it of all: the one that was
    asked about, and one that should be near the answer. Where the answer is not near it, a third batch tells whether that
    is so. Where it is not, as with blocks whose number depends on the batch, a secant between a batch that fits and one
    that does not closes in, until both sides are confirmed.
    """
    here = step(batch)
    other = _near(here, batch, memory)
    phases = _Phases(here, step(other), batch, other)
    guess = phases.largest(memory)
    if guess == 0:
        return 0 if step(1).peak > memory else _closed_in(step, 1, 2, memory)
    if abs(guess - other) <= max(1, other // 16):
        return guess
    small = _Phases(step.small(batch), step.small(other), batch, other)
    return guess if small.foretell(guess, step.small(guess)) else _closed_in(step, 0, guess, memory)


def _near(parts: Parts, batch: int, memory: int) -> int:
    """A batch near the largest one, by what each sample keeps in a step."""
    each = max(1, parts.activations // batch)
    rises = parts.phases[:-1] or parts.phases  # the last one is the optimizer's, which the batch makes no difference to
    found = max(1, batch + (memory - max(rises)) // each)
    return found if found != batch else batch + 1


class _Phases:
    """Straight lines through the phases of two batches."""

    def __init__(self, one: Parts, two: Parts, batch: int, other: int) -> None:
        slopes = [(b - a) / (other - batch) for a, b in zip(one.phases, two.phases, strict=True)]
        self.lines = [(a - slope * batch, slope) for a, slope in zip(one.phases, slopes, strict=True)]

    def peak(self, count: int) -> float:
        """Of a batch."""
        return max(a + slope * count for a, slope in self.lines)

    def largest(self, memory: int) -> int:
        """The largest batch that should fit."""
        if self.peak(1) > memory:
            return 0
        return min((math.floor((memory - a) / slope) for a, slope in self.lines if slope > 0), default=1)

    def foretell(self, count: int, found: Parts) -> bool:
        """Whether they say of another batch what was found for it, to less than a quarter of a sample."""
        return all(abs(p - (a + slope * count)) <= slope / 4 for p, (a, slope) in zip(found.phases, self.lines, strict=True))


def _closed_in(step: Steps, fits: int, guess: int, memory: int) -> int:
    """By trying: ``fits`` is known to (or 0), everything else is not."""
    fails = math.inf
    while fails - fits > 1:
        if step(guess).peak <= memory:
            fits = guess
        else:
            fails = guess
        if math.isinf(fails):
            guess = fits + max(1, fits // 64)
        elif fits == 0:
            guess = max(1, min(int(fails) - 1, int(fails) - int(fails) // 64))
        else:
            low, high = step(fits).peak, step(int(fails)).peak
            guess = min(int(fails) - 1, max(fits + 1, fits + int((memory - low) / max(1, high - low) * (fails - fits))))
    return fits
