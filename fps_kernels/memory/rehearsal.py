"""What one step of a method takes, found by taking it with tensors that have no memory."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fps_kernels.choosing.budgets import PerNeuron
from fps_kernels.choosing.feeding import Forward
from fps_kernels.choosing.gps import gps_select
from fps_kernels.choosing.select import select
from fps_kernels.keeping.kept import kept
from fps_kernels.memory.measuring import LiveTensors
from fps_kernels.selection import Selection
from fps_kernels.tuning.attaching import attach
from fps_kernels.tuning.masked_adamw import MaskedAdamW
from fps_kernels.weights.roles import classifier_modules, default_dense
from fps_kernels.weights.survey import Survey

EIGHT_BITS = "-8bit"


@dataclass(frozen=True)
class Parts:
    """What a step takes, in bytes: each number is a sum of one share for every block and one for every sample.

    Attributes:
        phases: most bytes of live tensors in each phase of the step; in which one the peak is depends on the batch.
        weights: parameters and buffers.
        activations: what the forward pass keeps; of a forward pass alone, its most.
        gradients: of the parameters, at the end of the backward pass.
        optimizer: its state.
    """

    phases: tuple[int, ...]
    weights: int
    activations: int
    gradients: int
    optimizer: int

    @property
    def peak(self) -> int:
        """Of the whole step."""
        return max(self.phases)

    def numbers(self) -> tuple[int, ...]:
        """All of them in a row."""
        return (self.weights, self.activations, self.gradients, self.optimizer, *self.phases)

    @classmethod
    def of(cls, numbers: Iterable[int]) -> "Parts":
        """From such a row."""
        weights, activations, gradients, optimizer, *phases = numbers
        return cls(tuple(phases), weights, activations, gradients, optimizer)


@dataclass(frozen=True)
class Occasion:
    """What all methods have in common.

    Attributes:
        size: of one sample.
        dtype: of weights and activations.
        k: entries per output neuron.
        forward: ``forward(model, batch)`` gives the logits, or ``None``.
    """

    size: tuple[int, ...]
    dtype: torch.dtype
    k: int
    forward: Forward | None

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Samples and labels."""
        return torch.empty(count, *self.size, dtype=self.dtype), torch.zeros(count, dtype=torch.long)

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        """Of a batch."""
        found: Tensor = model(x) if self.forward is None else self.forward(model, x)
        return found


Rehearsal = Callable[[int], Parts]
"""From a batch size to what a step takes."""


def rehearsal(method: str, model: nn.Module, occasion: Occasion, selection: Selection | None = None) -> Rehearsal:
    """Make a model, inside of :func:`~fps_kernels.memory.simulated`, ready for a method. It is the method's from then on.

    Args:
        method: one of :data:`~fps_kernels.memory.planning.METHODS`.
        model: without memory.
        occasion: what else counts.
        selection: of what :func:`chosen` gives; for ``attach`` alone.
    """
    if method == "FPS":
        return partial(_sample_by_sample, model, occasion)
    if method in ("forward", "GPS"):
        return partial(_choosing, method, model, occasion)
    return _Training(method, model, occasion, selection)


def chosen(model: nn.Module, occasion: Occasion) -> Selection:
    """Entries that have no values here, so that a choice from the shapes alone is as good as any."""
    sample, _ = occasion.batch(1)
    return select(model, [sample], budget=PerNeuron(occasion.k), forward=occasion.forward, progress=False)


def _choosing(method: str, model: nn.Module, o: Occasion, count: int) -> Parts:
    x, y = o.batch(count)
    weights = size_of([*model.parameters(), *model.buffers()])
    live = _live([model, x, y])
    with live:
        if method == "forward":
            with torch.no_grad():
                o.logits(model.eval(), x)
        elif method == "FPS":
            select(model, [x], budget=PerNeuron(o.k), micro_batch=1, forward=o.forward, progress=False)
        else:
            gps_select(model, [(x, y)], loss="cross_entropy", budget=PerNeuron(o.k), forward=o.forward, progress=False)
    gradients = weights if method == "GPS" else 0  # of all weights, until the choice is made
    return Parts((live.peak,), weights, live.peak - live.before - gradients, gradients, 0)


def _sample_by_sample(model: nn.Module, o: Occasion, count: int) -> Parts:
    few = min(count, 2)  # the third sample and all further ones do as the second did, but for lying there
    found = _choosing("FPS", model, o, few)
    (peak,) = found.phases
    return replace(found, phases=(peak + (count - few) * size_of(o.batch(1)),))


class _Training:
    """Steps of one method on one model; its optimizer has no state before the first one."""

    def __init__(self, method: str, model: nn.Module, o: Occasion, selection: Selection | None) -> None:
        self.model, self.occasion = model.train(), o
        self._stepping: int | None = None  # peak of the optimizer's step, which the batch makes no difference to
        self.optimizer: torch.optim.Optimizer
        in_8_bits = method.endswith(EIGHT_BITS)
        self.keeping: AbstractContextManager[None] = kept() if in_8_bits else nullcontext()
        if method.startswith("attach"):
            selection = chosen(model, o) if selection is None else selection
            tuner, self.keeping = attach(model, selection, keep_bits=8 if in_8_bits else None), nullcontext()
            self.optimizer = MaskedAdamW(tuner)
        else:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, foreach=False)

    def __call__(self, count: int) -> Parts:
        x, y = self.occasion.batch(count)
        self.optimizer.zero_grad()
        state = size_of(_states(self.optimizer))
        live = _live([self.model, x, y, *_states(self.optimizer)])
        peaks = []
        with live:
            with self.keeping:
                loss = F.cross_entropy(self.occasion.logits(self.model, x).float(), y)
            activations = live.peak - live.before
            peaks.append(live.restart())
            loss.backward()
            peaks.append(live.restart())
            gradients = size_of(p.grad for p in self.model.parameters() if p.grad is not None)
            if self._stepping is None:
                self.optimizer.step()
                self._stepping = live.peak - size_of([x, y])
        # The first step has the state at its end only; later ones have it all the time.
        new = size_of(_states(self.optimizer)) - state
        weights = size_of([*self.model.parameters(), *self.model.buffers()])
        return Parts(
            (*(p + new for p in peaks), self._stepping + size_of([x, y])), weights, activations, gradients, state + new
        )


class _LowRank(nn.Module):
    """A linear layer with LoRA beside it (Hu et al., ICLR 2022), in the operations that PEFT runs."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        # PEFT keeps what it adds in float32, whatever the model is.
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        added: Tensor = self.up(self.down(x.to(torch.float32)))
        return (result + added * 2.0).to(result.dtype)


def with_lora(model: nn.Module) -> nn.Module:
    """The model with LoRA of rank 8 on every linear layer but the heads, as PEFT has it; heads and biases whole.

    Raises:
        ValueError: there is no such layer.
    """
    survey = Survey.of(model)
    heads = tuple(classifier_modules(survey))
    trained = [survey.parameters[name] for name in default_dense(survey)]
    layers = lora_layers(model)
    if not layers:
        raise ValueError("LoRA needs linear layers, and the model has none but its head: leave LoRA out of methods")
    kept = [p for head in heads for p in model.get_submodule(head).parameters()]
    for p in model.parameters():
        p.requires_grad_(False)
    for name in layers:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        model.set_submodule(name, _LowRank(module, 8))
    for p in (*trained, *kept):
        p.requires_grad_(True)
    return model


def lora_layers(model: nn.Module) -> list[str]:
    """The linear layers that LoRA goes to."""
    survey = Survey.of(model)
    heads = tuple(classifier_modules(survey))
    first_paths = {module: name for name, module in reversed(survey.modules.items())}
    return [name for m, name in first_paths.items() if type(m) is nn.Linear and not name.startswith(heads)]


def size_of(tensors: Iterable[Any]) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _live(existing: Iterable[nn.Module | Tensor]) -> LiveTensors:
    live = LiveTensors()
    live.add(existing)
    return live


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
