"""What each way of choosing and tuning would need, and the largest batch that fits: nothing is allocated, no GPU needed."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from fps_kernels.memory.measuring import format_bytes, measure, simulated
from fps_kernels.tuning.attaching import attach
from fps_kernels.tuning.masked_adamw import MaskedAdamW
from fps_kernels.weights.roles import classifier_modules, default_dense
from fps_kernels.weights.survey import Survey

METHODS = ("forward", "FPS", "GPS", "full", "LoRA", "attach", "full-8bit", "LoRA-8bit", "attach-8bit")
_EIGHT_BITS = "-8bit"
_ASKED_FOR = ("full-8bit", "LoRA-8bit")  # methods that are not planned by default
MEANINGS = {
    "forward": "inference",
    "FPS": "choosing by FPS, micro-batches of 1",
    "GPS": "choosing by gradients, whole batch, cross-entropy",
    "full": "tuning every parameter, AdamW",
    "LoRA": "PEFT's LoRA r=8 on every linear layer but the head, biases and head whole, AdamW",
    "attach": "tuning the chosen entries, biases and head whole, MaskedAdamW",
    "full-8bit": "as full, what backward keeps in 8 bits (fps.kept)",
    "LoRA-8bit": "as LoRA, what backward keeps in 8 bits (fps.kept)",
    "attach-8bit": "as attach, what backward keeps in 8 bits (keep_bits=8)",
}


@dataclass(frozen=True)
class MethodCost:
    """What one method needs, in bytes. Each part is at its largest, not all at one time: their sum may exceed the peak.

    Attributes:
        method: one of :data:`METHODS`.
        batch_size: images a step.
        peak: most bytes of live tensors at any time of a step that has the optimizer's state.
        weights: parameters and buffers, those that the method adds included.
        activations: what the forward pass keeps for the backward pass; of a forward pass alone, its most.
        gradients: of the parameters, at the end of the backward pass.
        optimizer: its state.
        largest_batch: the largest batch that fits the memory asked about, 0 if none fits; ``None`` if none was asked about,
            and for FPS, which goes through a batch of any size one sample at a time.
    """

    method: str
    batch_size: int
    peak: int
    weights: int
    activations: int
    gradients: int
    optimizer: int
    largest_batch: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`plan` found.

    Attributes:
        model: its name.
        dtype: of weights and activations.
        costs: one per method.
        memory: bytes that the largest batches were sought for, or ``None``.
    """

    model: str
    dtype: torch.dtype
    costs: tuple[MethodCost, ...]
    memory: int | None

    def __getitem__(self, method: str) -> MethodCost:
        for cost in self.costs:
            if cost.method == method:
                return cost
        raise KeyError(method)

    def __str__(self) -> str:
        names = ["method", "peak", "weights", "activations", "gradients", "optimizer"]
        rows = [
            [c.method, *(format_bytes(getattr(c, name)) for name in names[1:])]
            + (["any" if c.largest_batch is None else str(c.largest_batch)] if self.memory is not None else [])
            for c in self.costs
        ]
        head = names + ([f"largest batch in {format_bytes(self.memory)}"] if self.memory is not None else [])
        widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *rows)]
        title = f"{self.model}, batch {self.costs[0].batch_size}, {str(self.dtype).removeprefix('torch.')}"
        return "\n".join([title, *lines])


def plan(
    model: str | Callable[[], nn.Module],
    batch_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    memory: int | None = None,
    methods: Sequence[str] | None = None,
    k: int = 4,
    input_size: Sequence[int] | None = None,
    forward: Forward | None = None,
) -> MemoryPlan:
    """What each way of choosing and tuning would need, without allocating it.

    Every method is run on tensors that have shapes and no memory. For ``attach`` every column of an input counts as needed,
    since which are chosen is not known: an upper bound, by the inputs of the attention's projections.

    Args:
        model: the name of a timm model, or a function that makes the model.
        batch_size: images a step.
        dtype: of weights and activations: ``torch.float32`` or ``torch.bfloat16``.
        memory: bytes of a card; the largest batch that fits it is sought for each method.
        methods: of :data:`METHODS`; by default all but ``full-8bit`` and ``LoRA-8bit``, LoRA only where PEFT is installed.
        k: entries per output neuron, for ``attach``.
        input_size: of one sample, such as ``(3, 224, 224)``; a timm model knows its own.
        forward: ``forward(model, batch)`` gives the logits; by default ``model(batch)``.

    Returns:
        :class:`MemoryPlan`, which prints as a table.

    Raises:
        ValueError: a number out of range, an unknown method or model, or an input size that is not known.
        ImportError: LoRA was asked for without PEFT, or a model name without timm.

    Example:
        >>> print(fps.memory.plan("vit_huge_patch14_224", 8, memory=24 * 2**30))
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if memory is not None and memory < 1:
        raise ValueError(f"memory must be a positive number of bytes, got {memory}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    has_peft = importlib.util.find_spec("peft") is not None
    usual = (m for m in METHODS if m not in _ASKED_FOR and (m != "LoRA" or has_peft))
    chosen = tuple(methods) if methods is not None else tuple(usual)
    for method in chosen:
        if method not in METHODS:
            raise ValueError(f"methods must be of {', '.join(METHODS)}, got {method!r}")
    if not has_peft and any(method.startswith("LoRA") for method in chosen):
        raise ImportError("planning LoRA needs peft: pip install peft")
    create, size, name = _model(model, input_size)
    cost = partial(_cost, create, size, dtype, k, forward)
    costs = []
    for method in chosen:
        found = cost(method, batch_size)
        if memory is not None and (method != "FPS" or found.peak > memory):
            largest = _largest_batch(lambda n, method=method: cost(method, n).peak, memory)  # type: ignore[misc]
            found = MethodCost(**{**found.__dict__, "largest_batch": largest})
        costs.append(found)
    return MemoryPlan(name, dtype, tuple(costs), memory)


def _model(
    model: str | Callable[[], nn.Module], input_size: Sequence[int] | None
) -> tuple[Callable[[], nn.Module], tuple[int, ...], str]:
    if not isinstance(model, str):
        if input_size is None:
            raise ValueError("input_size is needed with a function that makes the model, such as (3, 224, 224)")
        return model, tuple(input_size), getattr(model, "__name__", "model")
    import timm

    if not timm.is_model(model):
        similar = ", ".join(timm.list_models(f"*{model.split('_')[0]}*")[:3])
        raise ValueError(f"timm has no model {model!r}" + (f" (but {similar})" if similar else ""))
    if input_size is None:
        with torch.device("meta"):
            input_size = timm.create_model(model).pretrained_cfg["input_size"]
    return partial(timm.create_model, model), tuple(input_size), model


def _cost(
    create: Callable[[], nn.Module],
    size: tuple[int, ...],
    dtype: torch.dtype,
    k: int,
    forward: Forward | None,
    method: str,
    batch_size: int,
) -> MethodCost:
    with simulated() as build:
        model = build(lambda: _with_lora(create().to(dtype)) if method.startswith("LoRA") else create().to(dtype))
        x, y = torch.empty(batch_size, *size, dtype=dtype), torch.zeros(batch_size, dtype=torch.long)
        if method in ("forward", "FPS", "GPS"):
            weights = _bytes([*model.parameters(), *model.buffers()])
            report = measure(partial(_choose, method, model, x, y, k, forward), existing=[model, x, y])
            gradients = weights if method == "GPS" else 0  # of all weights, until the choice is made
            return MethodCost(method, batch_size, report.peak, weights, report.added - gradients, gradients, 0)
        return _training(method, model, x, y, k, forward)


def _choose(method: str, model: nn.Module, x: Tensor, y: Tensor, k: int, forward: Forward | None) -> None:
    if method == "forward":
        with torch.no_grad():
            model.eval()
            _logits(model, x, forward)
    elif method == "FPS":
        select(model, [x], budget=PerNeuron(k), micro_batch=1, forward=forward, progress=False)
    else:
        gps_select(model, [(x, y)], loss="cross_entropy", budget=PerNeuron(k), forward=forward, progress=False)


def _logits(model: nn.Module, x: Tensor, forward: Forward | None) -> Tensor:
    logits: Tensor = model(x) if forward is None else forward(model, x)
    return logits


def _training(method: str, model: nn.Module, x: Tensor, y: Tensor, k: int, forward: Forward | None) -> MethodCost:
    model.train()
    optimizer: torch.optim.Optimizer
    in_8_bits = method.endswith(_EIGHT_BITS)
    keeping: AbstractContextManager[None] = kept() if in_8_bits else nullcontext()
    if method.startswith("attach"):
        # Entries have no values here, so that a choice from the shapes alone is as good as any.
        selection = select(model, [x[:1]], budget=PerNeuron(k), forward=forward, progress=False)
        tuner, keeping = attach(model, selection, keep_bits=8 if in_8_bits else None), nullcontext()
        optimizer = MaskedAdamW(tuner)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)

    def loss() -> Tensor:
        with keeping:
            return F.cross_entropy(_logits(model, x, forward).float(), y)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    step()
    existing: list[Any] = [model, x, y, *_states(optimizer)]
    optimizer.zero_grad()
    report = measure(step, existing=existing)
    gradients = _bytes(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.zero_grad()
    after_forward = measure(loss, existing=existing)
    weights = _bytes([*model.parameters(), *model.buffers()])
    return MethodCost(method, x.shape[0], report.peak, weights, after_forward.added, gradients, _bytes(_states(optimizer)))


def _with_lora(model: nn.Module) -> nn.Module:
    import peft

    survey = Survey.of(model)
    heads = tuple(classifier_modules(survey))
    first_paths = {module: name for name, module in reversed(survey.modules.items())}
    targets = [name for m, name in first_paths.items() if isinstance(m, nn.Linear) and not name.startswith(heads)]
    trained = [survey.parameters[name] for name in default_dense(survey)]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=list(heads))
    wrapped: nn.Module = peft.get_peft_model(model, config)
    for p in trained:
        p.requires_grad_(True)
    return wrapped


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _largest_batch(peak: Callable[[int], int], memory: int) -> int:
    """The largest batch whose peak fits, confirmed on both sides.

    Peaks are flat where the optimizer sets them, and a straight line beyond: a line through a batch that fits and one that
    does not never overshoots then, and its second guess lies on the straight part.
    """
    known = {1: peak(1)}
    if known[1] > memory:
        return 0
    fits, fails = 1, 8
    known[fails] = peak(fails)
    while known[fails] <= memory:
        slope = (known[fails] - known[fits]) / (fails - fits)
        fits = fails
        fails = 8 * fits if slope <= 0 else fits + 1 + math.ceil(1.05 * (memory - known[fits]) / slope)
        known[fails] = peak(fails)
    while fails - fits > 1:
        share = (memory - known[fits]) / (known[fails] - known[fits])
        guess = min(fails - 1, max(fits + 1, fits + int(share * (fails - fits))))
        known[guess] = peak(guess)
        if known[guess] <= memory:
            fits = guess
        else:
            fails = guess
    return fits
